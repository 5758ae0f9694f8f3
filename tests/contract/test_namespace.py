"""The user's namespace: which names a trainer has, and which its subclass may take for itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from distaff import Callback
from line import Line, Trained, trained

NAMES_OF_A_TRAINER = """
    init_logger save_model load_model save_metrics init_model run_model_init print_tabulate
    init_optimizer train_model train_epoch eval_model create_functions create_jitted_functions
    is_new_model_better on_training_start on_training_epoch_end on_validation_epoch_end tracker
    load_from_checkpoint bind_model

    loss_fn predict_fn model_inputs augment check_batch sample_weight
    predict load_weights export_weights variant evaluation_state

    Config state_class config model optimizer monitor callbacks loggers init_from example_batch
    state step epoch best best_metrics stop_reason train_step eval_step last_run
"""

NAMES = set(NAMES_OF_A_TRAINER.split())
"""The names of the source documents; those to write, and to call; those to read."""

HELPERS = (
    *("emit", "rank", "judge", "record", "info", "pause", "save", "restore", "begin", "result"),
    *("report", "plan", "table", "schedule", "facts", "prepare", "show", "chunks", "origin"),
    "settle",
)
"""Ordinary names that people give to helpers of their own."""

CONTROL = ("draw", "average", "mask_tokens")

OPTIONS = {"save_every": 1e-6}  # saves after each chunk, too


class Witness(Callback):
    """Notes every event and its step."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def on_training_start(self, info):
        self.events.append(("training_start", info.step))

    def on_step_end(self, info):
        self.events.append(("step_end", info.step))

    def on_epoch_end(self, info):
        self.events.append(("epoch_end", info.step))

    def on_validation_end(self, info):
        self.events.append(("validation_end", info.step))

    def on_checkpoint(self, info):
        self.events.append(("checkpoint", info.step))

    def on_training_end(self, info):
        self.events.append(("training_end", info.step))


class Observed(NamedTuple):
    """What a helper must not change."""

    result: Any
    saved: list[int]
    files: set[str]
    logged: list[dict[str, Any]]
    events: list[tuple[str, int]]


def observed(cls: type[Line], **options: Any) -> tuple[Trained, Observed]:
    witness = Witness()
    run = trained(cls, callbacks=[witness], **OPTIONS, **options)
    result = run.result._replace(path=None)
    return run, Observed(result, run.saved, run.files, run.logged, witness.events)


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Observed]:
    """The run without a helper."""
    return observed(Line, root=tmp_path_factory.mktemp("default"))


def public(trainer: Any) -> set[str]:
    """Returns the public names of a trainer, without those that its subclass here has added."""
    names = {*dir(type(trainer)), *vars(trainer)} - {"called"}
    return {name for name in names if not name.startswith("_")}


def test_trainer_has_the_public_names_that_a_user_needs(default):
    assert len(NAMES) <= 50
    assert public(default[0].trainer) == NAMES


def test_trainer_has_few_attributes(default):
    attributes = set(vars(default[0].trainer)) - {"called"}
    assert len(attributes) <= 14, sorted(attributes)


def test_trainer_is_one_class_and_what_one_has_without_training(default):
    bases = [each for each in type(default[0].trainer).__mro__ if each is not object]
    assert len(bases) <= 3, [each.__name__ for each in bases]


def with_methods(names: tuple[str, ...]) -> type[Line]:
    """Returns a trainer with helpers; nobody but the user calls them."""

    def helper(name: str) -> Any:
        def method(self, *args, **kwargs):
            self.called.append(name)
            return name

        return method

    return type("WithMethods", (Line,), {name: helper(name) for name in names})


def with_attributes(names: tuple[str, ...]) -> type[Line]:
    """Returns a trainer that sets attributes before and after the constructor of its base."""

    def make(self, **options: Any) -> None:
        vars(self).update(dict.fromkeys(names, "mine"))
        Line.__init__(self, **options)
        assert [getattr(self, name) for name in names] == ["mine"] * len(names)
        vars(self).update(dict.fromkeys(names, "mine"))

    return type("WithAttributes", (Line,), {"__init__": make})


def cases() -> list[Any]:
    """Returns names that are free, all names at once, and each by itself."""
    return [
        pytest.param(CONTROL, id="free"),
        pytest.param(HELPERS, id="all"),
        *(pytest.param((n,), id=n, marks=pytest.mark.slow) for n in HELPERS),
    ]


@pytest.mark.parametrize("names", cases())
def test_helpers_of_ones_own_change_nothing(names, default):
    run, seen = observed(with_methods(names))
    assert run.trainer.called == [], "they are called by something else than their user"
    assert [getattr(run.trainer, name)() for name in names] == list(names)
    assert seen == default[1]


@pytest.mark.parametrize("names", cases())
def test_attributes_of_ones_own_change_nothing(names, default):
    run, seen = observed(with_attributes(names))
    assert [getattr(run.trainer, name) for name in names] == ["mine"] * len(names)
    assert seen == default[1]


@pytest.mark.parametrize("name", ["step", "epoch"])
def test_attribute_named_as_progress_moves_no_checkpoint(name, default):
    class Own(Line):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            setattr(self, name, 7)

    try:
        _, seen = observed(Own)
    except AttributeError:  # it may be that it cannot be set
        seen = default[1]
    assert seen == default[1]


def test_run_without_helpers_does_what_they_might_change(default):
    run, seen = default
    assert (seen.result.status, seen.saved) == ("finished", [4, 8])
    assert run.result.best[:2] == (4, 1)
    kinds = {kind for kind, _ in seen.events}
    assert len(kinds) == 6, kinds
    assert len([kind for kind, _ in seen.events if kind == "step_end"]) == 8
    assert len(seen.logged) == 7

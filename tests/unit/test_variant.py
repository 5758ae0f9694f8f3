"""Variants of a trainer, its signature, and what `help` says of its options."""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import optax
import pytest

from distaff import Callback, TrainerConfig, TrainerModule
from distaff.core.config.options import Options, at_least, integer, option
from distaff.errors import ConfigError, FixedAttributeError, StateError
from distaff.metrics.monitor import Monitor
from line import Line, loader, trained


def test_variant_differs_in_what_was_asked_for_and_leaves_the_first_one_alone():
    first = trained(Line, seed=1).trainer
    weights, callback = np.asarray(first.state.params["w"]), Callback()
    other = first.variant(seed=2, callbacks=[callback], optimizer=optax.sgd(0.5))
    assert (other.config.seed, first.config.seed) == (2, 1)
    assert (other.callbacks.callbacks, first.callbacks.callbacks) == ((callback,), ())
    assert (other.state, other.step, other.best) == (None, 0, None)
    assert other.model is first.model
    result = other.train_model(loader(), loader(), num_epochs=1)
    assert (result.status, result.step) == ("finished", 4)
    np.testing.assert_array_equal(first.state.params["w"], weights)
    assert first.step == 4
    assert not np.allclose(other.state.params["w"], weights)  # it has the other optimizer


def test_variant_refuses_what_is_no_option():
    with pytest.raises(ConfigError, match="no option 'sead'"):
        Line().variant(sead=3)
    with pytest.raises(ConfigError, match="keep_last must be an integer, at least 1; got 0"):
        Line().variant(keep_last=0)
    with pytest.raises(ConfigError, match="takes no example_batch"):
        Line().variant(example_batch=None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", optax.sgd(0.5)),
        ("callbacks", ()),
        ("loggers", []),
        ("model", None),
        ("monitor", Monitor("train/loss")),
        ("init_from", {}),
        ("config", TrainerConfig()),
    ],
)
@pytest.mark.slow
def test_description_is_fixed_once_it_has_trained(name, value):
    trainer = trained(Line, seed=1).trainer
    with pytest.raises(FixedAttributeError, match=rf"{name} is fixed.*trainer\.variant\("):
        setattr(trainer, name, value)
    before = Line()
    setattr(before, name, value)
    assert getattr(before, name) is value


@pytest.mark.parametrize("name", ["step", "epoch", "best", "best_metrics", "last_run"])
def test_place_of_a_run_cannot_be_set(name):
    with pytest.raises(FixedAttributeError, match=f"{name} is read-only.*set trainer.state"):
        setattr(Line(), name, 3)


def test_variant_may_have_another_monitor():
    trainer = trained(Line, seed=1).trainer
    other = trainer.variant(monitor="train/loss")
    assert (other.monitor.name, trainer.monitor.name) == ("train/loss", "val/loss")


def test_last_run_is_that_of_the_last_training():
    trainer = Line()
    with pytest.raises(StateError, match="Call train_model first"):
        _ = trainer.last_run
    run = trained(Line)
    assert run.trainer.last_run.path == run.result.path
    assert run.trainer.last_run.report.throughput.steps == run.result.step == 8
    assert run.trainer.last_run.best_models[0] == run.result.best


def test_signature_and_help_name_each_option():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class OwnConfig(TrainerConfig):
        beams: int = option(4, "How many beams there are.", check=at_least(1))

    class Own(TrainerModule):
        Config = OwnConfig

    options = {field.name: field.default for field in dataclasses.fields(TrainerConfig)}
    for cls, expected in ((TrainerModule, options), (Own, {**options, "beams": 4})):
        parameters = inspect.signature(cls).parameters
        assert {n: p.default for n, p in parameters.items() if n in expected} == expected
        assert not [n for n, p in parameters.items() if p.kind is p.VAR_KEYWORD]
    text = inspect.getdoc(TrainerModule)
    assert not [name for name in options if f"\n    {name}: " not in text]
    assert not [name for name in options if f"\n    {name}: " not in TrainerConfig.__doc__]


def test_options_are_checked_and_classified_where_they_are_declared():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Some(Options):
        count: int = option(1, "A count.", check=at_least(1), resume="same run")
        offset: int = option(0, "An offset.", check=integer)

    assert dataclasses.astuple(Some(count=np.int64(3), offset=-2)) == (3, -2)
    assert type(Some(count=np.int64(3)).count) is int
    with pytest.raises(ConfigError, match="count must be an integer, at least 1; got 0"):
        Some(count=0)
    with pytest.raises(ConfigError, match="offset must be an integer; got 'x'"):
        Some(offset="x")
    assert (Some.names("same run"), Some.names("ignored")) == ({"count"}, set())


class Counts(Callback):
    def __init__(self):
        self.count = 0

    def get_state(self):
        return {"count": self.count}

    def set_state(self, state):
        self.count = state["count"]


class Hundreds(Counts):
    def on_epoch_end(self, info):
        self.count += 100


class Ones(Counts):
    fails = False

    def on_epoch_end(self, info):
        self.count += 1
        if self.fails:
            raise KeyboardInterrupt


def test_callbacks_that_change_places_keep_their_own_memory():
    hundreds, ones = Hundreds(), Ones()
    hundreds.count, ones.count, ones.fails = 300, 7, True
    with pytest.raises(KeyboardInterrupt):
        trained(Line, callbacks=[hundreds, ones], save_every=1e-6)
    hundreds, ones = Hundreds(), Ones()
    result = trained(Line, callbacks=[ones, hundreds], save_every=1e-6).result
    assert (result.status, result.path.name) == ("finished", "0001")
    assert (hundreds.count, ones.count) == (500, 9)


@pytest.mark.parametrize("name", ["report", "best_models", "forms"])
def test_names_that_are_on_the_last_run_by_now_warn_and_still_work(name):
    with pytest.raises(AttributeError, match=f"no attribute {name!r}"):
        getattr(Line(), name)
    trainer = trained(Line).trainer
    with pytest.warns(DeprecationWarning, match=rf"is deprecated.*trainer\.last_run\.{name}"):
        found = getattr(trainer, name)
    assert found == getattr(trainer.last_run, name)

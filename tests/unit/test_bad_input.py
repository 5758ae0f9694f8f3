"""Bad input: the rule, the offending values, the remedy; and nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distaff
from distaff import EarlyStopping, Monitor, OptimizerConfig, data, tasks, zoo
from distaff.errors import (
    BatchError,
    CheckpointError,
    ConfigError,
    DistaffError,
    LossError,
    MetricError,
    RunDirectoryError,
)

BATCH = {"x": np.ones((4, 3), np.float32), "y": np.ones(4, np.float32)}
SHORT = {**BATCH, "y": np.ones(3, np.float32)}


class Regression(distaff.TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])


def train(
    train_loader: Any = None,
    *loaders: Any,
    loss: Callable[..., Any] | None = None,
    num_epochs: Any = 2,
    steps_per_epoch: Any = None,
    attributes: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Trains on two steps an epoch, in everything but what a case changes as it should be."""
    attributes = dict(attributes or {})
    if loss is not None:
        attributes["loss_fn"] = lambda self, *arguments: loss(*arguments)
    trainer = type("Regression", (Regression,), attributes)(
        nn.Dense(1), **{"enable_progress_bar": False, **options}
    )
    train_loader = [BATCH] * 2 if train_loader is None else train_loader
    return trainer.train_model(
        train_loader, *loaders, num_epochs=num_epochs, steps_per_epoch=steps_per_epoch
    )


class Case(NamedTuple):
    attempt: Callable[[], Any]
    error: type[DistaffError]
    parts: tuple[str, ...]
    """The rule, the offending value, the remedy, as they stand in the message."""


def wrong_in_evaluation(params, batch, ctx):
    loss = jnp.square(ctx.apply(params, batch["x"])[:, 0])
    return loss if ctx.train else batch["x"]


def loss_case(loss: Callable[..., Any], *parts: str) -> Case:
    return Case(lambda: train(loss=loss), LossError, parts)


def option_case(options: dict[str, Any], *parts: str) -> Case:
    return Case(lambda: train(**options), ConfigError, parts)


def optimizer_case(attempt: Callable[[], Any], *parts: str) -> Case:
    return Case(lambda: train(optimizer=attempt()), ConfigError, parts)


LOSSES = {
    "shape": loss_case(
        lambda params, batch, ctx: ctx.apply(params, batch["x"]),
        *("one number per example, shape [4], or a scalar", "shape (4, 1)", "loss.mean(axis=(1,))"),
    ),
    "length": loss_case(
        lambda params, batch, ctx: ctx.apply(params, batch["x"])[:3, 0],
        *("one number per example, shape [4], or a scalar", "shape (3,)", "loss.mean()"),
    ),
    "dtype": loss_case(
        lambda params, batch, ctx: jnp.argmax(batch["x"], axis=1), "A loss is a float", "int32"
    ),
    "nothing": loss_case(
        lambda params, batch, ctx: None, "A loss is a float", "returned NoneType", "a scalar"
    ),
    "test": Case(
        lambda: train(None, None, [BATCH], loss=wrong_in_evaluation),
        LossError,
        ("one number per example, shape [4], or a scalar", "shape (4, 3)", "loss.mean(axis=(1,))"),
    ),
    "order": loss_case(
        lambda params, batch, ctx: ({}, jnp.ones(4)),
        *("returns loss, or (loss, metrics)", "dict", "metrics as a dict"),
    ),
    "metric": loss_case(
        lambda params, batch, ctx: (jnp.ones(4), {"twos": jnp.ones((2, 2))}),
        *("one entry per example, [4, ...]", "'twos' has shape (2, 2)", "metrics.Sum(twos)"),
    ),
    "absent": Case(
        lambda: distaff.TrainerModule(nn.Dense(1), enable_progress_bar=False).train_model(
            [BATCH], num_epochs=1
        ),
        LossError,
        ("TrainerModule has no loss", "Define loss_fn(self, params, batch, ctx)"),
    ),
    "labels": Case(
        lambda: tasks.Classifier(nn.Dense(2), enable_progress_bar=False).train_model(
            [BATCH], num_epochs=1
        ),
        LossError,
        ("Labels must be class indices", "float32"),
    ),
}

LENGTHS = ("the same leading length", "'y' has shape (3,), 'x' has shape (4, 3)", "one row per")
EMPTY = ("must yield at least one batch", "Check its source")
BATCHES = {
    "train": Case(lambda: train([SHORT] * 2), BatchError, LENGTHS),
    "val": Case(lambda: train(None, [SHORT]), BatchError, LENGTHS),
    "test": Case(lambda: train(None, None, [SHORT]), BatchError, LENGTHS),
    "empty train": Case(lambda: train([]), BatchError, ("The train loader", *EMPTY)),
    "empty val": Case(lambda: train(None, []), BatchError, ("The val loader", *EMPTY)),
    "empty test": Case(
        lambda: train(None, None, iter(())), BatchError, ("The test loader", *EMPTY)
    ),
    "lists": Case(
        lambda: train([{**BATCH, "x": BATCH["x"].tolist()}] * 2),
        BatchError,
        (
            "must have a leading axis",
            "'x/0/0' is a scalar",
            "values of all examples into one array",
        ),
    ),
    "texts": Case(
        lambda: train([{**BATCH, "x": np.array(["a"] * 4)}] * 2),
        BatchError,
        ("must hold numbers", "'x' has dtype <U1", "Encode it as numbers"),
    ),
    "example": Case(
        lambda: Regression(nn.Dense(1), example_batch=SHORT, enable_progress_bar=False),
        BatchError,
        LENGTHS,
    ),
    "input": Case(
        lambda: train([{"z": BATCH["x"], "y": BATCH["y"]}] * 2),
        BatchError,
        ("input must be in the batch", "holds ['y', 'z']", "Override model_inputs"),
    ),
    "arrays": Case(
        lambda: train(SHORT),
        BatchError,
        ("arrays of the train data must have the same length", "3 in 'y'", "one row per example"),
    ),
    "too few": Case(
        lambda: data.ArrayLoader(BATCH, batch_size=5, shuffle=True),
        BatchError,
        ("at least one batch", "4 examples, batch_size is 5", "lower batch_size"),
    ),
}

CLASSES = {"x": np.ones((4, 3), np.float32), "label": np.array([0, 1, 2, 1])}


def classify(*loaders: Any, outputs: int = 3, **options: Any) -> Any:
    trainer = tasks.Classifier(nn.Dense(outputs), enable_progress_bar=False, **options)
    return trainer.train_model(*loaders, num_epochs=1)


def with_value(name: str, value: Any, place: Any = 2) -> dict[str, Any]:
    """Returns a batch of both kinds with one number replaced."""
    batch = {key: np.array(leaf) for key, leaf in {**BATCH, **CLASSES}.items()}
    batch[name][place] = value
    return batch


def ragged(*lengths: int) -> np.ndarray:
    found = np.empty(len(lengths), object)
    found[:] = [np.ones(length) for length in lengths]
    return found


class Lists:
    """A loader of one's own, of which nobody makes arrays."""

    def __init__(self, *batches: Any) -> None:
        self.batches, self.state = batches, {"epoch": 0, "batch": 0}

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.batches, 1):
            self.state = {"epoch": self.state["epoch"], "batch": number}
            yield batch
        self.state = {"epoch": self.state["epoch"] + 1, "batch": 0}

    def get_state(self) -> dict[str, int]:
        return self.state

    def set_state(self, state: Any) -> None:
        self.state = dict(state)


def batches_of_one() -> Iterator[Any]:
    yield BATCH


VALUES = {
    "ragged": Case(
        lambda: train([{**BATCH, "x": ragged(2, 3, 2, 2)}] * 2),
        BatchError,
        ("of a batch of the train loader must", "'x' has dtype object and holds arrays", "Pad all"),
    ),
    "objects": Case(
        lambda: train(None, [{**BATCH, "x": np.array([{}] * 4)}]),
        BatchError,
        ("of the val loader must hold numbers", "'x' has dtype object.", "Encode it"),
    ),
    "text": Case(
        lambda: train(Lists({**BATCH, "name": "four"})),
        BatchError,
        ("train loader must be arrays", "'name' is of type str", "Encode it as numbers"),
    ),
    "used up": Case(
        lambda: train(batches_of_one()),
        BatchError,
        ("train loader must yield its batches again in each of 2", "generator", "not its call"),
    ),
    "used up val": Case(
        lambda: train(None, batches_of_one()), BatchError, ("The val loader must", "only once")
    ),
    **{
        f"{value} {name}": Case(
            lambda loaders=loaders, value=value: train(
                *(each and [with_value("x", value, (2, 1))] for each in loaders)
            ),
            BatchError,
            (
                f"in a batch of the {name} loader, 'x' has 1 {found} among 12 values, first in",
                "example 2",
                "Check how it is read",
                "on_bad_input='warn'",
            ),
        )
        for value, found in ((np.nan, "NaN"), (-np.inf, "infinite"))
        for name, loaders in (
            ("train", (True,)),
            ("val", (None, True)),
            ("test", (None, None, True)),
        )
    },
    "label above": Case(
        lambda: classify([with_value("label", 7)] * 2),
        BatchError,
        ("class indices from 0 to 2", "range from 0 to 7", "example 2 is 7", "one output per"),
    ),
    "label below": Case(
        lambda: classify([CLASSES], [with_value("label", -1)]),
        BatchError,
        ("of the val loader range from -1 to 1", "example 2 is -1"),
    ),
    "label from one": Case(
        lambda: classify([CLASSES], None, [{**CLASSES, "label": np.array([1, 2, 3, 1])}]),
        BatchError,
        ("of the test loader range from 1 to 3", "example 2 is 3", "Subtract 1"),
    ),
}

METRICS = {
    "monitor": Case(
        lambda: train(None, [BATCH], attributes={"monitor": Monitor("val/los")}),
        MetricError,
        ("'val/los' is not among", "Did you mean 'val/loss'? Known: 'val/loss'", "set monitor ="),
    ),
    "early stopping": Case(
        lambda: train(None, [BATCH], callbacks=[EarlyStopping(Monitor("val/acuracy"))]),
        MetricError,
        ("'val/acuracy' is not among", "Known: 'val/loss'"),
    ),
}

OPTIONS = {
    "option": option_case({"log_every_n_step": 3}, "no option 'log_every_n_step'. Did you mean "),
    "argument": option_case({"optimiser": 3}, "no option 'optimiser'. Did you mean 'optimizer'?"),
    "range": option_case({"keep_last": 0}, "keep_last must", "at least 1", "got 0"),
    "text": option_case({"log_every_n_steps": "five"}, "log_every_n_steps must", "got 'five'"),
    "fraction": option_case({"check_val_every_n_epoch": 1.5}, "an integer", "got 1.5"),
    "seed": option_case({"seed": "a"}, "seed must be an integer", "got 'a'"),
    "name": option_case({"name": "../up"}, "simple path components", "'../up'", "For example"),
    "epochs": option_case({"num_epochs": 0}, "num_epochs must", "at least 1", "got 0"),
    "bool epochs": option_case({"num_epochs": True}, "num_epochs must be an integer", "got True"),
    "half epochs": option_case({"num_epochs": 2.5}, "num_epochs must be an integer", "got 2.5"),
    "steps": option_case({"steps_per_epoch": 0}, "steps_per_epoch must", "at least 1", "got 0"),
    "minus": option_case({"steps_per_epoch": -1}, "steps_per_epoch must", "at least 1", "got -1"),
    "class": Case(
        lambda: Regression(nn.Dense), ConfigError, ("not its class", "pass Dense(...) instead")
    ),
    "function": Case(
        lambda: Regression(len), ConfigError, ("A model must be a flax.linen.Module", "builtins")
    ),
}

OPTIMIZERS = {
    "name": optimizer_case(
        lambda: OptimizerConfig("adamv"), "No optimizer is called 'adamv'", "Did you mean 'adam"
    ),
    "string": optimizer_case(
        lambda: "adamw", "must be an OptimizerConfig", "'adamw'", "OptimizerConfig('adamw')?"
    ),
    "option": optimizer_case(
        lambda: OptimizerConfig("adamw", options={"nestrov": True}),
        *("'adamw' has no option 'nestrov'", "Did you mean 'nesterov'?"),
    ),
    "schedule": optimizer_case(
        lambda: OptimizerConfig(schedule="cosin"),  # ty: ignore[invalid-argument-type]
        *("No schedule is called 'cosin'", "Did you mean 'cosine'?"),
    ),
    "warm-up": optimizer_case(
        lambda: OptimizerConfig(warmup_steps=50),
        *("shorter than the run", "warmup_steps is 50", "4 optimizer steps", "Lower warmup_steps"),
    ),
    "decay": optimizer_case(
        lambda: OptimizerConfig("adam", weight_decay=0.1),
        *("'adam' has no weight decay", "weight_decay is 0.1", 'OptimizerConfig("adamw"'),
    ),
    "function": optimizer_case(
        lambda: optax.adam, "Optax's function 'adam' itself", "Call it, or pass OptimizerConfig"
    ),
}

CHECKPOINTS = {
    "missing": Case(
        lambda: Regression.load_from_checkpoint("runs/nothing"),
        CheckpointError,
        ("no whole checkpoint", "nothing, which does not exist", "Pass a run directory"),
    ),
    "nothing in it": Case(
        lambda: Regression.load_from_checkpoint("."),
        CheckpointError,
        ("no whole checkpoint", "holds nothing", "Pass a run directory"),
    ),
}


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def cases(*tables: dict[str, Case]) -> Any:
    return pytest.mark.parametrize(
        "case",
        [pytest.param(case, id=name) for table in tables for name, case in table.items()],
        indirect=True,
    )


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@cases(LOSSES, BATCHES, VALUES, METRICS, OPTIONS, OPTIMIZERS, CHECKPOINTS)
@pytest.mark.slow
def test_bad_input_is_explained_before_anything_is_written(case, tmp_path, capfd):
    with pytest.raises(DistaffError) as caught:
        case.attempt()
    assert type(caught.value) is case.error
    for part in case.parts:
        assert part in str(caught.value)
    assert everything(tmp_path) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("root", ["file", "file/runs"])
def test_run_directory_with_a_file_in_its_way_is_refused(root, tmp_path):
    Path("file").write_text("mine")
    with pytest.raises(RunDirectoryError) as caught:
        train(root=root)
    for part in ("must be one that can be written", "file", "Move that file"):
        assert part in str(caught.value)
    assert everything(tmp_path) == ["file"]
    assert Path("file").read_text() == "mine"


def test_run_directory_without_permission_is_refused(tmp_path, monkeypatch):
    def refuse(*arguments, **kwargs):
        raise PermissionError(13, "Permission denied")

    # Changing the mode of a folder would not stop a superuser.
    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(RunDirectoryError, match=r"Permission denied.*change its permissions"):
        train(root="locked")
    assert everything(tmp_path) == []


def test_trainer_can_be_used_after_a_refusal(tmp_path):
    trainer = Regression(nn.Dense(1), enable_progress_bar=False)
    trainer.optimizer = OptimizerConfig(warmup_steps=50)
    with pytest.raises(ConfigError):
        trainer.train_model([BATCH] * 2, num_epochs=1)
    trainer.optimizer = OptimizerConfig()
    result = trainer.train_model([BATCH] * 2, num_epochs=1)
    assert (result.step, result.path) == (2, Path("runs/regression/0001").absolute())
    assert jax.tree.all(jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), trainer.state.params))


def test_bad_values_may_be_trained_on_with_a_warning_or_without_a_word():
    batches = [{**BATCH, "unused": np.array([np.nan, np.inf, 0, np.nan], np.float32)}] * 2
    with pytest.warns(UserWarning, match=r"'unused' has 2 NaN and 1 infinite among 4 values"):
        train(batches, root=None, on_bad_input="warn")
    train(batches, root=None, on_bad_input="ignore")
    with pytest.raises(ConfigError, match="on_bad_input has no value 'raised'"):
        train(batches, on_bad_input="raised")


def test_run_that_skips_bad_steps_takes_bad_batches():
    batches = [with_value("x", np.nan), with_value("x", 1.0)]
    result = classify(batches, root=None, on_bad_numbers="skip")
    assert result.step == 2
    assert np.isfinite(result.metrics["train/loss"])


def test_labels_are_not_looked_at_under_a_loss_of_ones_own():
    class Masked(tasks.Classifier):
        def loss_fn(self, params, batch, ctx):
            logits = ctx.apply(params, batch["x"])
            one_hot = jax.nn.one_hot(batch["label"], 3)  # all zeros where there is no label
            return optax.losses.softmax_cross_entropy(logits, one_hot)

    trainer = Masked(nn.Dense(3), root=None, enable_progress_bar=False)
    assert trainer.train_model([with_value("label", -1)], num_epochs=1).step == 1


def test_doubles_are_trained_on_as_floats_with_one_warning_that_names_them():
    wide = {**BATCH, "x": BATCH["x"].astype(np.float64)}
    dtypes = []

    def loss(params, batch, ctx):
        dtypes.append(batch["x"].dtype)
        return jnp.square(ctx.apply(params, batch["x"])[:, 0])

    with pytest.warns(
        UserWarning, match="the train loader, JAX casts 'x' from float64 to float32"
    ) as caught:
        train([wide] * 3, root=None, loss=loss)
    assert len(caught) == 1
    assert set(dtypes) == {jnp.dtype("float32")}


def test_later_batch_that_is_none_is_named_with_its_loader():
    for bad, said in (
        ({**BATCH, "y": BATCH["y"].tolist()}, "'y/0' is of type float"),
        (SHORT, "'y' has shape"),
        ({**BATCH, "x": np.array(["a"] * 4)}, "'x' has dtype <U1"),
    ):
        with pytest.raises(BatchError, match="of a batch of the train loader") as caught:
            train(Lists(BATCH, bad), root=None)
        assert said in str(caught.value)


def test_inspection_costs_nothing_after_the_first_batch(monkeypatch):
    looked_at = []

    class Looking(Regression):
        def check_batch(self, batch, name):
            looked_at.append(name)
            super().check_batch(batch, name)

    trainer = Looking(nn.Dense(1), root=None, enable_progress_bar=False)
    trainer.train_model([BATCH] * 5, [BATCH] * 2, [BATCH], num_epochs=2)
    assert looked_at == ["train", "val", "test"]


@pytest.mark.slow
def test_labels_that_a_loss_changes_before_it_hands_them_on_are_its_own() -> None:
    class Parity(tasks.Classifier):
        def loss_fn(self, params, batch, ctx):
            return super().loss_fn(params, {**batch, "label": batch["label"] % 2}, ctx)

    batch = {"image": np.eye(4, dtype=np.float32), "label": np.arange(4, dtype=np.int32)}
    options: dict[str, Any] = {"root": None, "enable_progress_bar": False}
    assert Parity(nn.Dense(2), **options).train_model([batch] * 2, num_epochs=1).step == 2
    with pytest.raises(BatchError, match="from 0 to 1"):
        tasks.Classifier(nn.Dense(2), **options).train_model([batch] * 2, num_epochs=1)


@pytest.mark.slow
def test_tokens_that_the_model_lacks_are_named_before_training() -> None:
    options: dict[str, Any] = {"root": None, "enable_progress_bar": False}
    model = zoo.GPT(vocab_size=16, num_layers=1, num_heads=2, features=8)
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    assert tasks.LanguageModel(model, **options).train_model([tokens] * 2, num_epochs=1).step == 2
    for bad in (16, -100):
        tokens[1, 3] = bad
        with pytest.raises(BatchError, match=f"from 0 to 15.*at 3 of example 1 is {bad}"):
            tasks.LanguageModel(model, **options).train_model([tokens] * 2, num_epochs=1)

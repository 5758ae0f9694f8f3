"""Samples of the model and histograms of its weights, logged after validations."""

from __future__ import annotations

import json
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.random import key

from distaff import Callback, StepInfo, TrainerModule
from distaff.callbacks import Samples, WeightHistograms
from distaff.data import ArrayLoader
from distaff.errors import BatchError, ConfigError, StateError
from distaff.loggers import MemoryLogger
from scripted import CtrlC


class Line(TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])


def loader() -> ArrayLoader:
    x = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)
    return ArrayLoader({"x": x, "y": x.sum(1)}, 4)


def line(tmp_path, *callbacks: Callback, **options: Any) -> Line:
    quiet: dict[str, Any] = {"root": tmp_path, "enable_progress_bar": False}
    return Line(nn.Dense(1), callbacks=callbacks, **{**quiet, **options})


def train(trainer: Line, num_epochs: int = 3):
    return trainer.train_model(loader(), loader(), num_epochs=num_epochs)


@pytest.mark.slow
def test_samples_are_files_and_records_and_change_no_number(tmp_path):
    memory, seen = MemoryLogger(), []

    def make(info: StepInfo) -> dict[str, Any]:
        predicted = trainer.predict(loader())
        seen.append((info.step, np.asarray(info.state.params["kernel"]).copy()))
        return {"val/image": np.zeros((2, 3), np.uint8), "text": f"{np.shape(predicted)}"}

    trainer = line(tmp_path, Samples(make, every=2), loggers=[memory], steps_per_call=2)
    result = train(trainer, num_epochs=4)
    assert [step for step, _ in seen] == [8, 16]
    files = {str(path.relative_to(result.path)) for path in result.path.glob("[it]*s/**/*.*")}
    assert files == {
        *("images/val/image_8.png", "images/val/image_16.png"),
        *("texts/text_8.txt", "texts/text_16.txt"),
    }
    assert [(each.kind, each.name, each.step) for each in memory.media] == [
        *(("image", "val/image", 8), ("text", "text", 8)),
        *(("image", "val/image", 16), ("text", "text", 16)),
    ]
    assert (result.path / "texts/text_8.txt").read_text() == "(16, 1)"
    plain = line(tmp_path / "plain", steps_per_call=2)
    assert train(plain, num_epochs=4).metrics == result.metrics


def test_resumed_run_makes_samples_of_the_same_validations(tmp_path):
    made: list[int] = []

    def make(info: StepInfo) -> dict[str, str]:
        made.append(info.step)
        return {"text": "a"}

    assert train(line(tmp_path, Samples(make, every=2), CtrlC(6))).status == "interrupted"
    assert made == []
    assert train(line(tmp_path, Samples(make, every=2), CtrlC(6))).status == "finished"
    assert made == [8]


@pytest.mark.parametrize(
    ("made", "options", "error", "text"),
    [
        ("a text", {}, ConfigError, "by name"),
        ({"a": np.zeros((2, 3, 4, 1))}, {}, BatchError, "one image at a time"),
        ({"a": "text"}, {"root": None}, ConfigError, r"'a' \(text\)"),
    ],
)
@pytest.mark.slow
def test_wrong_sample_is_an_error(made, options, error, text, tmp_path):
    with pytest.raises(error, match=text):
        train(line(tmp_path, Samples(lambda info: made), **options), num_epochs=1)


def test_histograms_go_to_a_logger_that_supports_them(tmp_path):
    memory = MemoryLogger()
    trainer = line(tmp_path, WeightHistograms("ker*"), loggers=[memory])
    result = train(trainer, num_epochs=2)
    assert [(each.kind, each.name, each.step) for each in memory.media] == [
        ("histogram", "params/kernel", 4),
        ("histogram", "params/kernel", 8),
    ]
    last = np.asarray(trainer.state.params["kernel"], np.float64).ravel()
    best = np.concatenate([each.content for each in memory.media]).reshape(2, 2)
    assert (best == last).all(axis=1).any()  # the trainer ends with its best weights
    assert not (result.path / "histograms").exists()


def test_histograms_are_else_counts_and_edges_in_a_file(tmp_path):
    result = train(line(tmp_path, WeightHistograms(every=2)), num_epochs=2)
    [path] = (result.path / "histograms").iterdir()
    content = json.loads(path.read_text())
    assert (path.name, sorted(content)) == ("params_8.json", ["params/bias", "params/kernel"])
    for each in content.values():
        assert len(each["edges"]) == len(each["counts"]) + 1 == 65
    assert sum(content["params/kernel"]["counts"]) == 2


def test_histogram_equals_numpys_and_leaves_out_what_is_not_finite(tmp_path):
    values = np.r_[np.random.default_rng(0).normal(size=100), np.nan, np.inf]
    params = {"a": jnp.asarray(values, jnp.bfloat16), "b": jnp.full(3, jnp.nan)}
    trainer = line(tmp_path)
    train(trainer, num_epochs=1)
    where = {"path": tmp_path, "logger": trainer.last_run.logger}
    info = StepInfo(7, 1, trainer.state.replace(params=params), {}, **where)
    WeightHistograms().on_validation_end(info)
    content = json.loads((tmp_path / "histograms/params_7.json").read_text())
    finite = np.asarray(params["a"]).astype(np.float64)[:100]
    counts, edges = np.histogram(finite, 64)
    assert content == {"params/a": {"counts": counts.tolist(), "edges": edges.tolist()}}


def test_histograms_without_a_place_or_a_match_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match="needs a logger that supports histograms"):
        train(line(tmp_path, WeightHistograms(), root=None))
    with pytest.raises(ConfigError, match="'kernels'"):
        train(line(tmp_path, WeightHistograms("kernels")))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Samples({"a": 1}),
        lambda: Samples(lambda info: {}, every=0),
        lambda: WeightHistograms(()),
        lambda: WeightHistograms((1,)),
        lambda: WeightHistograms(every="2 epochs"),
    ],
)
def test_wrong_arguments_are_errors(make):
    with pytest.raises(ConfigError):
        make()


def test_outside_of_a_run_there_is_no_logger():
    with pytest.raises(StateError, match=r"callbacks=\[Samples\(...\)\]"):
        Samples(lambda info: {}).on_validation_end(StepInfo(1, 1, None, {}))


@pytest.mark.parametrize(
    "model", [lambda: nnx.Linear(2, 1, rngs=nnx.Rngs(0)), lambda: eqx.nn.Linear(2, 1, key=key(0))]
)
@pytest.mark.slow
def test_histograms_cover_the_parameters_of_other_families(model, tmp_path):
    quiet: dict[str, Any] = {"root": tmp_path, "enable_progress_bar": False}
    trainer = Line(model(), callbacks=[WeightHistograms()], **quiet)
    [path] = (train(trainer, num_epochs=1).path / "histograms").iterdir()
    sizes = [sum(each["counts"]) for each in json.loads(path.read_text()).values()]
    assert sorted(sizes) == [1, 2]

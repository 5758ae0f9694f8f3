"""Metrics of other libraries, of the form of `clu.metrics` and metrax, as a loss returns them."""

from __future__ import annotations

import importlib
import json
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import metrics as sklearn_metrics

from distaff import Callback, TrainerModule, data, metrics, train_step
from distaff.errors import LossError, MetricError

RNG = np.random.default_rng(0)
N = 22
X = RNG.normal(size=(N, 3)).astype(np.float32)
Y = RNG.integers(0, 2, N).astype(np.int32)
HITS = (X[:, 0] > 0) == Y


@flax.struct.dataclass
class Accuracy:
    """The form of `metrax.Accuracy`: a sum and a count, both of integers."""

    total: jax.Array
    count: jax.Array

    @classmethod
    def empty(cls) -> Accuracy:
        return cls(total=jnp.array(0, jnp.int32), count=jnp.array(0, jnp.int32))

    @classmethod
    def from_model_output(cls, predictions: Any, labels: Any) -> Accuracy:
        correct = predictions == labels
        return cls(total=correct.sum(), count=jnp.ones_like(labels, dtype=jnp.int32).sum())

    def merge(self, other: Accuracy) -> Accuracy:
        assert self.total.shape == other.total.shape
        assert np.issubdtype(self.count.dtype, np.integer)
        return type(self)(total=self.total + other.total, count=self.count + other.count)

    def compute(self) -> Any:
        return jnp.where(self.count != 0, jnp.divide(self.total, self.count), 0.0)


@flax.struct.dataclass
class Range:
    """A metric that merges by functions of JAX, with a flag, an array and a static field."""

    any_seen: jax.Array
    highest: jax.Array
    name: str = flax.struct.field(pytree_node=False, default="range")

    @classmethod
    def empty(cls) -> Range:
        return cls(any_seen=jnp.array(False), highest=jnp.full(3, -jnp.inf))

    @classmethod
    def from_model_output(cls, values: Any) -> Range:
        return cls(any_seen=jnp.array(True), highest=values.max(0))

    def merge(self, other: Range) -> Range:
        any_seen = jnp.logical_or(self.any_seen, other.any_seen)
        return self.replace(any_seen=any_seen, highest=jnp.maximum(self.highest, other.highest))

    def compute(self) -> Any:
        return jnp.where(self.any_seen, self.highest.sum(), jnp.nan)


@flax.struct.dataclass
class Collected:
    """The form of `clu.metrics.CollectingMetric`: it stores the outputs and merges on the host."""

    values: dict[str, tuple[Any, ...]]

    @classmethod
    def empty(cls) -> Collected:
        return cls(values={})

    @classmethod
    def from_model_output(cls, **outputs: Any) -> Collected:
        return cls(values={name: (value,) for name, value in outputs.items()})

    def merge(self, other: Collected) -> Collected:
        return type(self)({n: (*value, *other.values[n]) for n, value in self.values.items()})

    def compute(self) -> Any:
        values = {name: np.concatenate(parts) for name, parts in self.values.items()}
        return sklearn_metrics.average_precision_score(values["labels"], values["scores"])


class Scored(TrainerModule):
    """Its loss returns metrics of another library."""

    def loss_fn(self, params: Any, batch: Any, ctx: Any) -> Any:
        outputs = ctx.apply(params, batch["x"])
        loss = jnp.square(outputs[:, 0] - batch["y"])
        guesses = (batch["x"][:, 0] > 0).astype(jnp.int32)
        found: dict[str, Any] = {
            "accuracy": Accuracy.from_model_output(guesses, batch["y"]),
            "range": Range.from_model_output(batch["x"]),
        }
        if not ctx.train:
            scores = {"scores": batch["x"][:, 1], "labels": batch["y"]}
            found["precision"] = Collected.from_model_output(**scores)
        return loss, found


MODEL = (
    lambda key, *inputs: {"w": jnp.full((3, 1), 0.5)},
    lambda params, x: jnp.matmul(x, params["w"]),
)


def trainer(cls: Any = Scored, **options: Any) -> Any:
    fixed: dict[str, Any] = {"optimizer": optax.sgd(0.05), "enable_progress_bar": False}
    return cls(MODEL, **{"root": None, **fixed, **options})


def loader(size: int = 8, **options: Any) -> data.ArrayLoader:
    return data.ArrayLoader({"x": X, "y": Y}, size, **options)


@pytest.mark.parametrize("size", [N, 8, 5])
@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_evaluation_is_that_over_all_examples(size: int, steps_per_call: int):
    run = trainer(steps_per_call=steps_per_call, example_batch={"x": X, "y": Y})
    found = run.eval_model(loader(size))
    assert found["accuracy"] == pytest.approx(HITS.mean(), rel=1e-6)
    assert found["range"] == pytest.approx(X.max(0).sum(), rel=1e-6)
    assert found["precision"] == pytest.approx(
        sklearn_metrics.average_precision_score(Y, X[:, 1]), rel=1e-12
    )
    assert found["loss"] == pytest.approx(((0.5 * X.sum(1) - Y) ** 2).mean(), rel=1e-5)


class Interrupt(Callback):
    """Interrupts a run within its second epoch, or does nothing."""

    def __init__(self, *, cuts: bool) -> None:
        self.cuts = cuts

    def on_step_end(self, info: Any) -> None:
        if self.cuts and info.step == 7:
            raise KeyboardInterrupt


def trained(name: str, *, cuts: bool = False, **options: Any) -> Any:
    options = {"root": "runs", "log_every_n_steps": 5, "save_every": 1e-6, **options}
    run = trainer(name=name, callbacks=[Interrupt(cuts=cuts)], **options)
    return run.train_model(loader(5, seed=1), loader(), num_epochs=3)


def logged(result: Any) -> list[dict[str, Any]]:
    lines = map(json.loads, (result.path / "metrics.jsonl").read_text().splitlines())
    return [{name: x for name, x in line.items() if "time" not in name} for line in lines]


@pytest.mark.slow
def test_windows_are_merged_fused_and_resumed_bit_for_bit():
    whole, fused = trained("whole", steps_per_call=1), trained("fused", steps_per_call=4)
    assert fused.metrics == whole.metrics
    assert whole.metrics["val/accuracy"] == pytest.approx(HITS.mean(), rel=1e-6)
    assert logged(fused) == logged(whole)
    assert any("train/accuracy" in line for line in logged(whole))
    with pytest.raises(KeyboardInterrupt):
        trained("cut", cuts=True)
    resumed = trained("cut")
    assert resumed.first_step == 6  # within an epoch and a window
    assert resumed.metrics == whole.metrics
    assert logged(resumed) == logged(whole)


def test_skipped_step_has_empty_metrics():
    arrays = {"x": np.where(np.arange(N)[:, None] == 6, np.nan, X).astype(np.float32), "y": Y}
    run = trainer(on_bad_numbers="skip", on_bad_input="ignore")
    result = run.train_model(data.ArrayLoader(arrays, 5, shuffle=False), num_epochs=1)
    kept = HITS[[*range(5), *range(10, N)]]
    assert result.metrics["train/skipped"] == 1
    assert result.metrics["train/accuracy"] == pytest.approx(kept.mean(), rel=1e-6)


@flax.struct.dataclass
class Empty(Accuracy):
    """A metric whose `empty` has other shapes."""

    @classmethod
    def empty(cls) -> Any:
        return cls(total=jnp.zeros((2, 2)), count=jnp.zeros(()))


def loss_with(metric: Any) -> Any:
    def loss_fn(self: Any, params: Any, batch: Any, ctx: Any) -> Any:
        loss = jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])
        return loss, {"extra": metric(batch)}

    return type("With", (TrainerModule,), {"loss_fn": loss_fn})


def test_metric_of_another_kind_is_an_error():
    collected = loss_with(lambda batch: Collected.from_model_output(labels=batch["y"]))
    with pytest.raises(MetricError, match="stores every example, so use it in evaluation"):
        trainer(collected).train_model(loader(), num_epochs=1)

    class Plain:
        def empty(self) -> Any:
            return self

        merge = compute = empty

    with pytest.raises(LossError, match=r"'extra', of class Plain, is not a pytree.*flax\.struct"):
        trainer(loss_with(lambda batch: Plain())).train_model(loader(), num_epochs=1)
    scalar = loss_with(lambda batch: Empty(total=batch["y"].sum(), count=jnp.int32(N)))
    trainer(scalar).train_model(loader(), num_epochs=1)
    with pytest.raises(MetricError, match=r"Empty\.empty\(\) has other shapes"):
        trainer(scalar, on_bad_numbers="skip").train_model(loader(), num_epochs=1)

    @flax.struct.dataclass
    class Several(Range):
        def compute(self) -> Any:
            return {"low": 0.0, "high": 1.0}

    several = loss_with(lambda batch: Several.from_model_output(batch["x"]))
    with pytest.raises(MetricError, match=r"several values, \['high', 'low'\]"):
        trainer(several).train_model(loader(), num_epochs=1)


def test_count_beyond_float32_is_exact():
    count = 2**24 + 1
    one = metrics.declare("x", Accuracy(total=jnp.int32(1), count=jnp.int32(count)), 1)
    total = metrics.to_host({"x": one})
    for _ in range(3):
        total = metrics.merge(total, metrics.to_host({"x": one}))
    assert jax.tree.leaves(total) == [4, 4 * count]


def test_step_of_ones_own_takes_them_too():
    def loss_fn(params: Any, batch: Any, ctx: Any) -> Any:
        outputs = ctx.apply(params, batch["x"])[:, 0]
        guesses = (batch["x"][:, 0] > 0).astype(jnp.int32)
        return outputs**2, {"accuracy": Accuracy.from_model_output(guesses, batch["y"])}

    state = trainer(example_batch={"x": X, "y": Y}).state
    state = state.replace(tx=optax.sgd(0.1), opt_state=optax.sgd(0.1).init(state.params))
    _, found = jax.jit(train_step(loss_fn))(state, {"x": X, "y": Y})
    assert float(found["accuracy"].compute()) == pytest.approx(HITS.mean(), rel=1e-6)


@pytest.fixture
def lenient_jax() -> Any:
    """Allows the implicit promotions of metrax."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.peer("metrax")
@pytest.mark.usefixtures("lenient_jax")
def test_metrics_of_metrax_are_those_of_sklearn():
    metrax: Any = importlib.import_module("metrax")

    class WithMetrax(TrainerModule):
        def loss_fn(self, params: Any, batch: Any, ctx: Any) -> Any:
            outputs = ctx.apply(params, batch["x"])[:, 0]
            labels, chance = batch["y"], jax.nn.sigmoid(batch["x"][:, 0])
            guesses = (chance > 0.5).astype(jnp.int32)
            targets = {"predictions": outputs, "labels": labels.astype(jnp.float32)}
            return jnp.square(outputs - labels), {
                "accuracy": metrax.Accuracy.from_model_output(predictions=guesses, labels=labels),
                "precision": metrax.Precision.from_model_output(predictions=chance, labels=labels),
                "auc": metrax.AUCROC.from_model_output(predictions=chance, labels=labels),
                "rmse": metrax.RMSE.from_model_output(**targets),
                "r2": metrax.RSQUARED.from_model_output(**targets),
            }

    run = trainer(WithMetrax, steps_per_call=2, log_every_n_steps=2, on_bad_numbers="skip")
    result = run.train_model(loader(5), loader(), num_epochs=2)
    found = run.eval_model(loader())
    assert found == {name: result.metrics[f"val/{name}"] for name in found}
    outputs = (X @ np.asarray(run.state.params["w"]))[:, 0]
    assert found["accuracy"] == pytest.approx(HITS.mean(), rel=1e-6)
    assert found["precision"] == pytest.approx(
        sklearn_metrics.precision_score(Y, X[:, 0] > 0), rel=1e-5
    )
    assert found["auc"] == pytest.approx(sklearn_metrics.roc_auc_score(Y, X[:, 0]), abs=0.02)
    assert found["rmse"] == pytest.approx(np.sqrt(((outputs - Y) ** 2).mean()), rel=1e-5)
    assert found["r2"] == pytest.approx(sklearn_metrics.r2_score(Y, outputs), rel=1e-4)

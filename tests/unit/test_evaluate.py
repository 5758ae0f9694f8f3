"""Evaluation and prediction: every example once, whatever the sizes of the batches."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff import EvalStep, TrainState
from distaff.data import as_loader
from distaff.errors import BatchError
from distaff.execution.execution import Compiled, Eager, Execution
from distaff.execution.feed.chunk import ChunkSize, pad
from distaff.execution.feed.feed import Feed
from distaff.metrics import Max, Mean, Sum, compute
from distaff.run.evaluation import Evaluator, predict
from distaff.step.context import Context

X = np.random.default_rng(1).normal(size=(11, 3)).astype(np.float32)
Y = np.arange(11, dtype=np.float32)
SQUARED = np.square(X.astype(np.float64).sum(1) - Y)


def state() -> TrainState:
    return TrainState.create(
        params={"w": jnp.ones(3)},
        apply_fn=lambda variables, x: x @ variables["params"]["w"],
        tx=optax.sgd(0.1),
    )


def batches(*sizes: int) -> Iterator[dict[str, np.ndarray]]:
    start = 0
    for size in sizes:
        yield {"x": X[start : start + size], "y": Y[start : start + size]}
        start += size


def evaluated(evaluate: Evaluator, state: TrainState, batches: Any, capacity: int = 1) -> Any:
    """Evaluates a list of batches, in chunks of up to `capacity`."""
    feed = Feed(as_loader(list(batches)), name="val", resident=False)
    return evaluate(state, feed.epoch(lambda: ChunkSize(capacity, capacity)))


class Counted:
    """A loss that counts how often Python runs it."""

    def __init__(self, metrics: Any) -> None:
        self.metrics, self.calls = metrics, 0

    def __call__(self, params: Any, batch: Any, ctx: Context) -> Any:
        self.calls += 1
        loss = jnp.square(ctx.apply(params, batch["x"]) - batch["y"])
        return self.metrics(loss, batch["y"])


def per_example(loss: jax.Array, y: jax.Array) -> Any:
    total, largest = Sum.per_example(y), Max.per_example(y)
    return loss, {"y": y, "weighted": Mean.per_example(y, y), "sum": total, "max": largest}


def reduced(loss: jax.Array, y: jax.Array) -> Any:
    total, largest, weighted = Sum(y.sum()), Max(y.max()), Mean(jnp.sum(y * y), jnp.sum(y))
    return loss.mean(), {"y": y, "weighted": weighted, "sum": total, "max": largest}


EXACT = {"loss": SQUARED.mean(), "max": 10.0, "sum": 55.0, "weighted": 7.0, "y": 5.0}


@pytest.mark.parametrize(
    ("execution", "capacity"), [(Compiled(), 1), (Eager(), 1), (Compiled(), 2), (Compiled(), 5)]
)
@pytest.mark.parametrize("metrics", [per_example, reduced])
@pytest.mark.parametrize("sizes", [(4, 4, 3), (11,), (1, 4, 1, 5)])
@pytest.mark.slow
def test_evaluator_is_exact_over_all_examples(sizes, metrics, execution: Execution, capacity: int):
    evaluate = Evaluator(EvalStep(Counted(metrics)), execution)
    assert compute(evaluated(evaluate, state(), batches(*sizes), capacity)) == pytest.approx(
        EXACT, rel=1e-6
    )


def test_evaluator_traces_per_example_metrics_once_for_all_sizes():
    loss, model = Counted(per_example), state()
    evaluate = Evaluator(EvalStep(loss), Compiled())
    for _ in range(2):
        evaluated(evaluate, model, batches(4, 4, 3))
    assert loss.calls == 1
    shapes: Any = evaluate.shapes(model, next(batches(4)))
    assert isinstance(shapes["loss"].weight, jax.ShapeDtypeStruct)
    assert loss.calls == 1


def test_evaluator_traces_reduced_metrics_once_per_size():
    loss, model = Counted(reduced), state()
    evaluate = Evaluator(EvalStep(loss), Compiled())
    for _ in range(2):
        evaluated(evaluate, model, batches(4, 4, 3))
    assert loss.calls == 2


@pytest.mark.parametrize("execution", [Compiled(), Eager()])
def test_evaluator_takes_any_function_of_state_and_batch(execution: Execution):
    def own(state: TrainState, batch: Any) -> Any:
        return {"y": batch["y"], "mean": batch["y"].mean(), "n": Sum(len(batch["y"]))}

    metrics = compute(evaluated(Evaluator(own, execution), state(), batches(2, 4, 4, 1)))
    assert metrics == {"mean": 5.0, "n": 11.0, "y": 5.0}


def test_evaluator_drains_long_loaders():
    evaluate = Evaluator(EvalStep(Counted(per_example)), Compiled())
    small = ({"x": X[:2], "y": np.full(2, n, np.float32)} for n in range(70))
    metrics = compute(evaluated(evaluate, state(), small))
    assert (metrics["y"], metrics["sum"], metrics["max"]) == (34.5, 4830.0, 69.0)


def test_evaluator_leaves_the_state_usable():
    model = state()
    evaluated(Evaluator(EvalStep(Counted(per_example)), Compiled()), model, batches(4))
    assert model.params["w"].tolist() == [1, 1, 1]


def test_evaluator_compiles_once_for_each_size_that_is_the_largest_so_far():
    loss, model = Counted(per_example), state()
    evaluate = Evaluator(EvalStep(loss), Compiled())
    for _ in range(2):
        assert compute(evaluated(evaluate, model, batches(3, 6, 2))) == pytest.approx(EXACT)
    assert loss.calls == 2


def contrastive(params: Any, batch: Any, ctx: Context) -> Any:
    logits = params["w"][0] * batch["x"] @ batch["x"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(len(logits)))


@pytest.mark.parametrize("scale", [1.0, 0.0])
@pytest.mark.parametrize("capacity", [1, 3])
def test_evaluator_does_not_pad_where_examples_meet(capacity, scale):
    model = state().replace(params={"w": scale * jnp.ones(3)})
    evaluate = Evaluator(EvalStep(contrastive), Compiled())
    found = compute(evaluated(evaluate, model, batches(4, 4, 3), capacity))["loss"]
    parts = [contrastive(model.params, batch, None) for batch in batches(4, 4, 3)]
    assert found == pytest.approx(float(jnp.concatenate(parts).mean()), rel=1e-6)


def test_fused_metrics_belong_to_the_data_set_that_they_are_of():
    def loss_fn(params: Any, batch: Any, ctx: Context) -> Any:
        width = batch["x"].shape[1]
        other = jnp.full((len(batch["y"]), 5 - width), -1.0)
        return batch["y"], {"x": Mean.per_example(batch["x"]), "z": Mean.per_example(other)}

    sets = [
        [{"x": np.tile(np.arange(width, dtype=np.float32), (4, 1)), "y": Y[:4]}] * 3
        for width in (2, 3)
    ]
    evaluate, model = Evaluator(EvalStep(loss_fn), Compiled()), state()
    for _ in range(2):
        for width, each in zip((2, 3), sets, strict=True):
            found = compute(evaluated(evaluate, model, each, 3))
            assert found["x"].tolist() == list(range(width))
            assert found["z"].tolist() == [-1.0] * (5 - width)


def test_evaluation_and_prediction_need_a_batch():
    with pytest.raises(BatchError, match="An evaluation needs at least one batch"):
        Evaluator(EvalStep(Counted(per_example)), Compiled())(state(), [])
    with pytest.raises(BatchError, match="A prediction needs at least one batch"):
        predict(lambda state, batch: batch, state(), [])


def test_pad_repeats_the_last_example():
    padded = pad({"x": np.array([[1, 2], [3, 4]]), "y": jnp.array([True, False])}, 4)
    assert padded["x"].tolist() == [[1, 2], [3, 4], [3, 4], [3, 4]]
    assert padded["y"].tolist() == [True, False, False, False]
    assert padded["y"].dtype == bool


@pytest.mark.parametrize("sizes", [(4, 4, 3), (2, 4, 4, 1), (11,)])
def test_predict_gathers_in_order_and_cuts_the_padding(sizes):
    traces = 0

    @jax.jit
    def step(state: TrainState, batch: Any) -> Any:
        nonlocal traces
        traces += 1
        return {"double": 2 * batch["x"], "both": (batch["y"], batch["y"] > 3)}

    outputs = predict(step, state(), batches(*sizes))
    np.testing.assert_array_equal(outputs["double"], 2 * X)
    np.testing.assert_array_equal(outputs["both"][0], Y)
    np.testing.assert_array_equal(outputs["both"][1], Y > 3)
    assert traces == len({max(sizes[: count + 1]) for count in range(len(sizes))})


@pytest.mark.parametrize("execution", [Compiled(), Eager()])
def test_predict_does_not_pad_where_examples_meet(execution):
    def step(state: TrainState, batch: Any) -> Any:
        return batch["y"] - batch["y"].mean()

    outputs = predict(execution.program(step), state(), batches(3, 4, 4), execution)
    parts = [batch["y"] - batch["y"].mean() for batch in batches(3, 4, 4)]
    np.testing.assert_allclose(outputs, np.concatenate(parts), rtol=1e-6)


@pytest.mark.parametrize("count", [32, 33, 34, 80])
def test_predict_keeps_the_order_of_long_loaders(count):
    step = jax.jit(lambda state, batch: batch + 1)
    short = {1, count - 1}
    source = np.split(np.arange(2 * count - 2), np.cumsum([2 - (n in short) for n in range(count)]))
    outputs = predict(step, state(), source[:-1])
    np.testing.assert_array_equal(outputs, np.arange(2 * count - 2) + 1)


@pytest.mark.parametrize(
    ("outputs", "shapes"),
    [
        (lambda batch: {"y": batch["y"], "mean": batch["y"].mean()}, "{'mean': (), 'y': (4,)}"),
        (lambda batch: batch["x"].T, "{'(the whole tree)': (3, 4)}"),
        (lambda batch: None, "{}"),
    ],
)
def test_predict_refuses_outputs_without_a_batch_axis(outputs, shapes):
    message = f"must have one entry per example (4); got the shapes {shapes}"
    with pytest.raises(BatchError, match=re.escape(message)):
        predict(lambda state, batch: outputs(batch), state(), batches(4, 4))

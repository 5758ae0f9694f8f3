"""Loaders that run out, batches of several lengths, and batches that are plain dataclasses."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from distaff import data, tasks
from distaff.errors import BatchError, ConfigError

X = np.linspace(-1, 1, 40, dtype=np.float32)[:, None]
ARRAYS = {"x": X, "y": 2 * X}
BATCH = {"x": X[:4], "y": ARRAYS["y"][:4]}


def train(loader: Any, num_epochs: int = 1, **options: Any) -> Any:
    trainer = tasks.Regressor(
        nn.Dense(1), optimizer=optax.sgd(0.1), root=None, enable_progress_bar=False
    )
    trainer.train_model(loader, num_epochs=num_epochs, **options)
    return trainer


def test_generator_that_runs_dry_says_how_many_batches_came_and_were_needed():
    with pytest.raises(BatchError, match=r"ran out: it yielded 10 batches of 12 that are needed"):
        train((BATCH for _ in range(10)), 3, steps_per_epoch=4)
    assert train((BATCH for _ in range(10)), 2, steps_per_epoch=4).step == 8


def test_steps_per_epoch_beyond_the_loader_is_an_error_before_training():
    with pytest.raises(ConfigError, match=r"steps_per_epoch=11 is more than .* 10 batches.*repeat"):
        train(data.ArrayLoader(ARRAYS, 4), steps_per_epoch=11)
    assert train(data.ArrayLoader(ARRAYS, 4), steps_per_epoch=11, repeat=True).step == 11
    assert train(data.ArrayLoader(ARRAYS, 4), 3, steps_per_epoch=7).step == 21


def test_steps_per_epoch_beyond_a_loader_of_unknown_length_is_found_out():
    def batches():
        yield from [BATCH] * 3

    with pytest.raises(BatchError, match=r"ran out after 3 batches, and steps_per_epoch=5"):
        train(batches, steps_per_epoch=5)
    assert train(batches, steps_per_epoch=5, repeat=True).step == 5
    assert train(batches, 2, steps_per_epoch=2).step == 4


def test_list_of_batches_of_two_lengths_compiles_once_for_each():
    lengths, traced = [3, 5, 3, 3, 5, 5, 3, 5], []

    class Model(tasks.Regressor):
        def loss_fn(self, params, batch, ctx):
            traced.append(batch["x"].shape)
            return ctx.apply(params, batch["x"])[..., 0].mean(1)

    batches = [{"x": np.ones((2, length, 1), np.float32)} for length in lengths]
    assert data.as_loader(batches).num_shapes == 2
    trainer = Model(nn.Dense(1), root=None, enable_progress_bar=False, recompile="error")
    trainer.train_model(batches, num_epochs=2)
    assert sorted(traced) == [(2, 3, 1), (2, 5, 1)]


def test_number_of_shapes_of_a_list():
    def shapes(*sizes: int) -> int:
        return data.as_loader([X[:size] for size in sizes]).num_shapes

    assert [shapes(4, 4, 4), shapes(4, 4, 2), shapes(3, 8, 2), shapes(4)] == [1, 1, 2, 1]


@dataclasses.dataclass
class Pair:
    x: Any
    y: Any


@dataclasses.dataclass(frozen=True)
class Example:
    x: Any
    y: Any


@pytest.mark.parametrize(
    "make",
    [
        lambda: [Pair(X[:4], 2 * X[:4])] * 4,
        lambda: data.from_examples([Example(x, 2 * x) for x in X[:16]], 4),
        lambda: data.MappedLoader(
            data.ArrayLoader(ARRAYS, 4), lambda batch: {"nested": Example(**batch)}
        ),
    ],
)
@pytest.mark.slow
def test_plain_dataclasses_are_batches(make):
    kinds = set()

    class Typed(tasks.Regressor):
        def model_inputs(self, batch):
            return super().model_inputs(batch["nested"] if isinstance(batch, dict) else batch)

        def loss_fn(self, params, batch, ctx):
            pair = batch["nested"] if isinstance(batch, dict) else batch
            kinds.add(type(pair))
            return (ctx.apply(params, pair.x)[:, 0] - pair.y[:, 0]) ** 2

    loader = make()
    trainer = Typed(nn.Dense(1), root=None, enable_progress_bar=False)
    trainer.train_model(loader, loader, num_epochs=1)
    assert kinds <= {Pair, Example}
    assert len(kinds) == 1
    assert len(jax.tree.leaves(trainer.predict(loader))[0]) in (16, 40)


def test_dataclass_with_what_is_no_array_is_an_error_that_names_it():
    @dataclasses.dataclass
    class Named:
        x: Any
        name: str

    with pytest.raises(BatchError, match=r"must hold numbers; 'name' has dtype"):
        train([Named(X[:4], "a")])


@dataclasses.dataclass
class Graphs:
    """Graphs of one batch: their nodes, one after the other, and a target for each graph."""

    nodes: Any
    graph_of_node: Any
    target: Any

    @property
    def num_examples(self) -> int:
        return self.target.shape[0]


def graphs(*sizes: int) -> Graphs:
    nodes = np.arange(sum(sizes), dtype=np.float32)[:, None]
    owners = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    target = np.array([[nodes[owners == n].sum()] for n in range(len(sizes))], np.float32)
    return Graphs(nodes, owners, target)


class OfGraphs(tasks.Regressor):
    def predict_fn(self, params, batch, ctx):
        out = ctx.apply(params, batch.nodes)
        return jax.ops.segment_sum(out, batch.graph_of_node, batch.num_examples)

    def loss_fn(self, params, batch, ctx):
        return jax.numpy.square(self.predict_fn(params, batch, ctx) - batch.target)[:, 0]

    def model_inputs(self, batch):
        return (batch.nodes,)


def test_batches_of_graphs_say_how_many_examples_they_have():
    batches = [graphs(1, 2, 3), graphs(2, 2, 2), graphs(4, 1)]
    trainer = OfGraphs(nn.Dense(1), root=None, enable_progress_bar=False, optimizer=optax.sgd(1e-3))
    trainer.train_model(batches, batches, num_epochs=1)
    outputs = trainer.predict(batches)
    targets = np.concatenate([batch.target for batch in batches])
    assert outputs.shape == (8, 1)
    assert trainer.eval_model(batches)["loss"] == pytest.approx(
        np.square(outputs - targets).mean(), rel=1e-5
    )


def test_batch_of_unequal_leaves_is_told_how_to_count():
    with pytest.raises(BatchError, match="a dataclass with a property num_examples"):
        train([{"x": X[:4], "y": X[:3]}])

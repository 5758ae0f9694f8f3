"""A step in micro-batches makes the update of the whole batch."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tests.line import Line, loader

from distaff import OptimizerConfig, TrainState, metrics, optim, tasks, zoo
from distaff.errors import BatchError, ConfigError
from distaff.optim import build_optimizer
from distaff.step.accumulation.micro_batches import in_micro_batches
from distaff.step.norms import Norms
from distaff.step.step import train_step

_random = np.random.default_rng(0)
BATCH = {
    "x": _random.normal(size=(22, 3)).astype(np.float32),
    "y": _random.normal(size=22).astype(np.float32),
    "w": _random.integers(0, 4, 22).astype(np.float32),
}


def errors(params, batch):
    return jnp.square(batch["x"] @ params["w"][0] + params["b"] - batch["y"])


def scalar(params, batch, ctx):
    return errors(params, batch).mean()


def per_example(params, batch, ctx):
    ctx.add_l2_loss(params, 0.1)
    return errors(params, batch), {"worst": metrics.Max.per_example(errors(params, batch))}


def weighted(params, batch, ctx):
    return metrics.Mean.per_example(errors(params, batch), weight=batch["w"])


def state(tx):
    params = {"w": jnp.ones((1, 3)), "b": jnp.zeros(())}
    return TrainState.create(params=params, tx=tx, rng=jax.random.key(0))


def stepped(loss, size, tx=None):
    tx = tx or build_optimizer(OptimizerConfig("adam", learning_rate=0.1, clip_norm=0.5), 2).tx
    step = jax.jit(in_micro_batches(train_step(loss, norms=Norms()), size, Norms()))
    after, measured = step(state(tx), BATCH)
    found = {name: each.compute() for name, each in measured.items() if each.is_result}
    return after, {name: float(x) for name, x in found.items()}


@pytest.mark.parametrize(
    ("loss", "size"),
    [
        (weighted, 5),  # parts of 5, 5, 5, 5 and 2 examples
        pytest.param(scalar, 5, marks=pytest.mark.slow),
        pytest.param(per_example, 11, marks=pytest.mark.slow),
    ],
)
def test_micro_batches_make_the_update_and_the_metrics_of_the_batch(loss, size):
    (whole, seen), (parts, found) = stepped(loss, None), stepped(loss, size)
    assert int(parts.step) == 1
    assert jax.tree.structure(parts) == jax.tree.structure(whole.replace(tx=parts.tx))
    assert found == pytest.approx(seen, rel=2e-6)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-8)  # noqa: E731
    jax.tree.map(close, parts.params, whole.params)
    jax.tree.map(close, parts.opt_state, whole.opt_state)


def test_each_micro_batch_of_each_step_draws_its_own_numbers():
    def loss(params, batch, ctx):
        drawn = jnp.full(len(batch["y"]), jax.random.uniform(ctx.rng))
        least, most = metrics.Min.per_example(drawn), metrics.Max.per_example(drawn)
        return errors(params, batch), {"least": least, "most": most}

    step, begun = jax.jit(in_micro_batches(train_step(loss), 11)), state(optax.sgd(0.1))
    drawn = [step(begun.replace(step=jnp.int32(n)), BATCH)[1] for n in (0, 1, 0)]
    pairs = [tuple(float(each[name].compute()) for name in ("least", "most")) for each in drawn]
    assert len({*pairs[0], *pairs[1]}) == 4
    assert pairs[2] == pairs[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Graphs:
    x: np.ndarray

    @property
    def num_examples(self) -> int:
        return 4


def test_what_cannot_be_split_is_an_error():
    step = in_micro_batches(train_step(scalar), 2)
    with pytest.raises(BatchError, match="counts its examples itself"):
        step(state(optax.sgd(0.1)), Graphs(np.ones((9, 3), np.float32)))
    with pytest.raises(ConfigError, match="micro_batch=None"):
        jax.eval_shape(in_micro_batches(train_step(scalar), 11), state(optax.lbfgs()), BATCH)

    class Own(Line):
        def create_functions(self):
            return super().create_functions()

    with pytest.raises(ConfigError, match="overrides create_functions"):
        Own(micro_batch=2, root=None, example_batch=loader().peek())
    with pytest.raises(ConfigError, match="micro_batch must be an integer, at least 1"):
        Line(micro_batch=0)
    with pytest.raises(ConfigError, match="a number of examples, 'auto' or None; got 'all'"):
        Line(micro_batch="all")


def test_weight_decay_in_two_places_is_still_found():
    with pytest.raises(ConfigError, match="Decay is in one place"):
        jax.eval_shape(in_micro_batches(train_step(per_example), 11), state(optax.adamw(1)), BATCH)


@pytest.mark.slow
def test_accumulation_over_batches_and_within_them_agree():
    config = OptimizerConfig("adam", learning_rate=0.1, accumulate=2)
    runs = []
    for size in (None, 5):
        tx = build_optimizer(config, 4).tx
        step, now = jax.jit(in_micro_batches(train_step(weighted), size)), state(tx)
        for _ in range(4):
            now, _ = step(now, BATCH)
        runs.append(now)
    assert int(optim.num_updates(runs[1].opt_state)) == 2
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-6), runs[1].params, runs[0].params
    )


@pytest.mark.slow
def test_on_a_mesh_the_losses_are_those_of_one_device():
    x = _random.normal(size=(64, 8)).astype(np.float32)
    y = x[:, :4].argmax(1).astype(np.int32)
    runs = {}
    for mesh in (None, "fsdp"):
        trainer = tasks.Classifier(
            zoo.MLP((32, 4), dropout=0.1), mesh=mesh, micro_batch=16, batch_size=32, root=None
        )
        runs[mesh] = trainer.train_model((x, y), num_epochs=2).metrics["train/loss"]
    assert runs["fsdp"] == pytest.approx(runs[None], rel=2e-6)
    with pytest.raises(ConfigError, match="does not divide over the 8 devices"):
        trainer.variant(micro_batch=4).train_model((x, y), num_epochs=1)

"""Optimizers that need more than a gradient, in the trainer: each does what it is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import distaff
from distaff import Callback, OptimizerConfig, TrainState, data, zoo
from distaff.errors import ConfigError

# Powers of two: compilers may divide by them or multiply by their inverse, it is the same.
EXAMPLES, SIZE = 32, 16
MODEL = zoo.MLP((8, 1))
NORMALIZED_SGD = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))


def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    x = random.normal(size=(EXAMPLES, 3)).astype(np.float32)
    y = x @ [1.0, -2.0, 0.5] + 0.3 + random.normal(size=EXAMPLES) / 10
    return {"x": x, "y": y.astype(np.float32)}


def loader(batch_size: int = SIZE) -> data.ArrayLoader:
    return data.ArrayLoader(arrays(), batch_size)


class Regression(distaff.TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])


class Steps(Callback):
    """Keeps the loss of each step, and the state after it."""

    def __init__(self) -> None:
        self.losses: list[np.ndarray] = []
        self.states: list[TrainState] = []

    def on_step_end(self, info):
        self.losses.append(np.asarray(info.metrics["loss"].compute()))
        self.states.append(info.state.replace(rng=None, **copied(info.state)))


def copied(state: TrainState) -> dict[str, Any]:
    members = {name: getattr(state, name) for name in ("params", "opt_state", "batch_stats")}
    return jax.tree.map(np.array, members)


def trained(
    optimizer: Any,
    *,
    model: nn.Module = MODEL,
    num_epochs: int = 3,
    batch_size: int = SIZE,
    cls: type[Any] = Regression,
) -> tuple[Any, Steps]:
    """Returns the parameters before training, and what was seen in it."""
    batches, steps = loader(batch_size), Steps()
    trainer = cls(
        model,
        optimizer=optimizer,
        callbacks=[steps],
        example_batch=next(iter(batches)),
        root=None,
        enable_progress_bar=False,
    )
    before = jax.tree.map(np.array, trainer.state.params)
    trainer.train_model(batches, num_epochs=num_epochs)
    return before, steps


def by_hand(
    tx: Any,
    params: Any,
    extra_args: Callable[..., dict[str, Any]],
    *,
    num_epochs: int = 3,
    batch_size: int = SIZE,
) -> tuple[Any, Any, list[Any]]:
    """Returns parameters, state and losses of a loop that knows Optax alone."""

    @jax.jit
    def step(params: Any, opt_state: Any, batch: Any) -> Any:
        def loss_of(params: Any) -> jax.Array:
            outputs = MODEL.apply({"params": params}, batch["x"])
            return jnp.square(outputs[:, 0] - batch["y"]).mean()

        value, grads = jax.value_and_grad(loss_of)(params)
        extra = extra_args(value, grads, loss_of)
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state, losses = tx.init(params), []
    for _ in range(num_epochs):
        for batch in loader(batch_size):
            params, opt_state, loss = step(params, opt_state, batch)
            losses.append(loss)
    return params, opt_state, losses


def same_bits(left: Any, right: Any) -> bool:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def nothing(value: Any, grads: Any, value_fn: Any) -> dict[str, Any]:
    return {}


def the_value(value: Any, grads: Any, value_fn: Any) -> dict[str, Any]:
    return {"value": value}


def all_of(value: Any, grads: Any, value_fn: Any) -> dict[str, Any]:
    return {"value": value, "grad": grads, "value_fn": value_fn}


def gradient_of(value: Any, grads: Any, value_fn: Any) -> dict[str, Any]:
    return {"grad_fn": lambda params, step: jax.grad(value_fn)(params)}


def constant(name: str, learning_rate: float, **options: Any) -> OptimizerConfig:
    return OptimizerConfig(name, learning_rate=learning_rate, schedule="constant", options=options)


def plateau(learning_rate: float = 0.1, **options: Any) -> optax.GradientTransformationExtraArgs:
    return optax.chain(
        optax.sgd(learning_rate), optax.contrib.reduce_on_plateau(factor=0.5, **options)
    )


def sam(outer: Any = None, **options: Any) -> optax.GradientTransformationExtraArgs:
    options = {"opaque_mode": True, **options}
    return optax.contrib.sam(outer or optax.sgd(0.05), NORMALIZED_SGD, **options)


RATE = optax.constant_schedule
BACKTRACKING = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10))
FORMS: dict[str, tuple[Any, Any, Callable[..., dict[str, Any]]]] = {
    "plateau": (plateau(patience=2), plateau(patience=2), the_value),
    "backtracking": (BACKTRACKING, BACKTRACKING, all_of),
    "lbfgs by name": (constant("lbfgs", 1.0), optax.lbfgs(RATE(1.0)), all_of),
    "schedule-free by name": (
        constant("schedule_free_adamw", 0.02, b2=0.99),
        optax.contrib.schedule_free_adamw(RATE(0.02), b2=0.99),
        nothing,
    ),
    "prodigy by name": (
        OptimizerConfig("prodigy", learning_rate=1.0, schedule="linear", end_fraction=0.0),
        optax.contrib.prodigy(optax.linear_schedule(1.0, 0.0, 6)),
        nothing,
    ),
    "muon by name": (constant("muon", 0.05), optax.contrib.muon(RATE(0.05)), nothing),
    "sam": (sam(), sam(), gradient_of),
    "sam, not opaque": (sam(opaque_mode=False), sam(opaque_mode=False), nothing),
    "accumulation from a factory": (
        lambda steps: optax.MultiSteps(plateau(patience=steps // 6), 2),
        optax.MultiSteps(plateau(patience=1), 2),
        the_value,
    ),
}


@pytest.mark.parametrize(("optimizer", "tx", "extra_args"), FORMS.values(), ids=FORMS)
@pytest.mark.slow
def test_trainer_is_ten_lines_of_optax_bit_for_bit(optimizer, tx, extra_args):
    before, steps = trained(optimizer)
    params, opt_state, losses = by_hand(tx, before, extra_args)
    assert same_bits(steps.losses, losses)
    assert same_bits(steps.states[-1].params, params)
    assert same_bits(*map(jax.tree.leaves, (steps.states[-1].opt_state, opt_state)))
    assert not same_bits(before, params)


@pytest.mark.slow
def test_plateau_lowers_the_scale_where_the_loss_stalls_and_nowhere_else():
    tx = plateau(0.05, patience=3, rtol=0.03)
    _, steps = trained(tx, num_epochs=60, batch_size=EXAMPLES, model=Line())
    scale, best, stalled, expected = 1.0, np.inf, 0, []
    for loss in steps.losses:
        best, stalled = (loss, 0) if loss < 0.97 * best else (best, stalled + 1)
        if stalled == 3:
            scale, stalled = scale / 2, 0
        expected.append(scale)
    scales = [float(optax.tree.get(state.opt_state, "scale")) for state in steps.states]
    assert scales == expected
    assert scales[10] == 1.0 > scales[-1]


class Line(nn.Module):
    """Linear regression on features of different size, which no one learning rate serves."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(x * jnp.array([[3.0, 1.0, 0.1]]))


@pytest.mark.slow
@pytest.mark.parametrize("tx", [optax.lbfgs(), BACKTRACKING], ids=["lbfgs", "backtracking"])
def test_line_search_never_lets_the_loss_rise_and_beats_every_fixed_rate(tx):
    options: Any = {"num_epochs": 25, "batch_size": EXAMPLES, "model": Line()}
    losses = np.array(trained(tx, **options)[1].losses)
    assert (np.diff(losses) <= 1e-6).all()
    fixed = [trained(optax.sgd(rate), **options)[1].losses[-1] for rate in (0.03, 0.06, 0.1)]
    assert losses[-1] < np.min(fixed)


@pytest.mark.slow
def test_lbfgs_reaches_the_least_squares_solution():
    options: Any = {"num_epochs": 25, "batch_size": EXAMPLES, "model": Line()}
    design = np.column_stack([arrays()["x"], np.ones(EXAMPLES)])
    least = np.linalg.lstsq(design, arrays()["y"])[1][0] / EXAMPLES
    assert trained(optax.lbfgs(), **options)[1].losses[-1] == pytest.approx(least, rel=1e-4)


def remembering(learning_rate: float) -> optax.GradientTransformation:
    """SGD whose state is the gradient it was given."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params=None: (
            jax.tree.map(lambda leaf: -learning_rate * leaf, grads),
            grads,
        ),
    )


@pytest.mark.slow
def test_sam_descends_along_the_gradient_of_the_perturbed_point():
    before, steps = trained(sam(remembering(0.05)), batch_size=EXAMPLES, num_epochs=1)

    def loss_of(params: Any) -> Any:
        outputs = MODEL.apply({"params": params}, arrays()["x"])
        return jnp.square(outputs[:, 0] - arrays()["y"]).mean()

    here = jax.grad(loss_of)(before)
    norm = optax.tree.norm(here)
    there = jax.grad(loss_of)(jax.tree.map(lambda p, g: p + 0.05 * g / norm, before, here))
    seen = steps.states[0].opt_state.opt_state
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), seen, there)
    assert optax.tree.norm(optax.tree.sub(there, here)) > 0.05 * norm


def test_prodigy_finds_a_learning_rate_of_its_own():
    _, steps = trained(constant("prodigy", 1.0), num_epochs=50)
    estimates = [float(optax.tree.get(state.opt_state, "estim_lr")) for state in steps.states]
    assert (np.diff(estimates) >= 0).all()
    assert estimates[-1] > 1e4 * estimates[0]
    assert steps.losses[-1] < 0.1 * steps.losses[0]


def test_muon_orthogonalizes_matrices_and_leaves_vectors_to_adam():
    before, steps = trained(constant("muon", 0.1), num_epochs=1)
    after = steps.states[0].params
    updates = jax.tree.map(lambda new, old: (new - old) / 0.1, after, before)
    wide = updates["Dense_0"]["kernel"] / np.sqrt(8 / 3)  # Optax's factor for width
    assert (np.abs(np.linalg.svd(wide)[1] - 1) < 0.4).all()
    lengths = np.abs(updates["Dense_0"]["bias"])  # the first update of Adam is a sign
    np.testing.assert_allclose(lengths, lengths[0], rtol=1e-3)


def test_accumulated_gradients_are_those_of_a_batch_of_that_size():
    _, small = trained(optax.MultiSteps(optax.adam(0.1), 2), batch_size=SIZE)
    _, large = trained(optax.adam(0.1), batch_size=EXAMPLES)
    for step, state in enumerate(large.states):
        pair = small.states[2 * step + 1].params, state.params
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *pair)
    assert same_bits(small.states[1].params, small.states[2].params)


class OwnStep(Regression):
    def create_functions(self):
        def step(state, batch):
            def objective(params):
                outputs = state.apply_fn({"params": params}, batch["x"])
                return jnp.square(outputs[:, 0] - batch["y"]).mean()

            loss, grads = jax.value_and_grad(objective)(state.params)
            state = state.apply_gradients(grads=grads, value=loss, value_fn=objective)
            return state, {"loss": loss}

        return step, lambda state, batch: {}


@pytest.mark.slow_but("sam")
@pytest.mark.parametrize("tx", [sam(), BACKTRACKING], ids=["sam", "backtracking"])
def test_a_step_of_ones_own_offers_the_same_by_value_and_value_fn(tx):
    _, own = trained(tx, cls=OwnStep)
    _, given = trained(tx)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        own.states[-1].params,
        given.states[-1].params,
    )


@pytest.mark.parametrize("name", ["sam", "reduce_on_plateau", "scale_by_backtracking_linesearch"])
def test_what_no_learning_rate_makes_is_no_name_of_an_optimizer(name):
    with pytest.raises(ConfigError, match=r"passed as the optax\.GradientTransformation itself"):
        OptimizerConfig(name)

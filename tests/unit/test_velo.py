from __future__ import annotations

import json
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff import Context, TrainerModule, TrainState, train_step
from distaff.checkpoint import CheckpointStore
from distaff.data import ArrayLoader
from distaff.errors import CheckpointError, ConfigError, LossError, StateError
from distaff.optim import OptimizerConfig, ParamGroup, accumulate, build_optimizer, decays, learned
from distaff.optim.learned import VeloState, read_weights, velo

FOLDER = Path(__file__).parents[1] / "golden" / "velo" / "small"
WEIGHTS = read_weights(FOLDER)
TOTAL_STEPS = 20
PARAMS = {
    "Dense_0": {"kernel": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "bias": jnp.ones(3)},
    "head": {"kernel": jnp.linspace(0.5, 2.0, 6).reshape(3, 2)},
}
HEAD = {"head": PARAMS["head"]}
MICRO_STEPS = [3.9, 0.1, 2.5, 0.5, 0.3, 0.9]  # The means of pairs fall, their last ones rise.


def gradients(params, step):
    return jax.tree.map(lambda leaf: jnp.sin(3 * leaf + step), params)


def trained(tx, params=PARAMS, steps=4):
    @jax.jit
    def update(state):
        grads, value = gradients(state.params, state.step), 2.0 / (1 + state.step)
        return state.apply_gradients(grads=grads, value=value)

    state = TrainState.create(params=params, tx=tx)
    for _ in range(steps):
        state = update(state)
    return state


def assert_close(left, right, rtol=2e-6, atol=1e-7):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), left, right)


def assert_differ(left, right):
    with pytest.raises(AssertionError):
        assert_close(left, right)


def assert_same_bits(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture(scope="module")
def plain():
    """The state after four steps of VeLO alone."""
    return trained(velo(WEIGHTS, TOTAL_STEPS))


@pytest.fixture
def folder(tmp_path):
    """The weights in a folder that may be removed."""
    return Path(shutil.copytree(FOLDER, tmp_path / "velo"))


@pytest.mark.slow
def test_parameters_of_every_rank_are_trained():
    shapes = [(), (1,), (5,), (3, 3), (1, 4), (2, 3, 2), (2, 2, 2, 3), (1, 2, 1, 2, 2)]
    params = {str(shape): jnp.ones(shape) for shape in shapes}
    tx = velo(WEIGHTS, TOTAL_STEPS)
    # Traced alone, for eight shapes take long to compile; the trajectories have four of them.
    updates, state = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, value=1.0), params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    assert state == jax.eval_shape(tx.init, params)  # so that steps can be fused by lax.scan


@pytest.mark.slow
def test_every_leaf_of_the_state_is_an_array(plain):
    assert isinstance(plain.opt_state, VeloState)
    leaves = jax.tree.leaves(plain.opt_state)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert {leaf.dtype.name for leaf in leaves} == {"float32", "int32"}
    fresh = jax.tree.leaves(velo(WEIGHTS, TOTAL_STEPS).init(PARAMS))
    assert all(isinstance(leaf, jax.Array) for leaf in fresh)


@pytest.mark.slow
def test_jit_equals_plain_python():
    state = TrainState.create(params=HEAD, tx=velo(WEIGHTS, TOTAL_STEPS))
    for step in range(2):
        grads = gradients(state.params, step)
        state = state.apply_gradients(grads=grads, value=jnp.float32(2.0 / (1 + step)))
    assert_close(state.params, trained(velo(WEIGHTS, TOTAL_STEPS), HEAD, steps=2).params)


def test_updates_have_the_dtype_of_low_precision_gradients():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), HEAD)
    tx = velo(WEIGHTS, TOTAL_STEPS)
    updates, state = jax.eval_shape(
        lambda p: tx.update(p, tx.init(p), p, value=jnp.ones([], jnp.bfloat16)), params
    )
    assert updates["head"]["kernel"].dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}


@pytest.mark.slow
def test_the_loss_and_the_length_of_the_run_matter():
    lengths = (TOTAL_STEPS, 2 * TOTAL_STEPS)
    assert_differ(*(trained(velo(WEIGHTS, length), HEAD).params for length in lengths))

    def last_update(value):
        tx = velo(WEIGHTS, TOTAL_STEPS)
        state = tx.init(HEAD)
        for loss in (1.0, 1.0, value):
            updates, state = jax.jit(tx.update)(HEAD, state, HEAD, value=loss)
        return updates

    assert_differ(last_update(0.5), last_update(1.5))


@pytest.mark.slow
def test_outliers_are_limited():
    tx = velo(WEIGHTS, TOTAL_STEPS)

    @jax.jit
    def after(gradient, loss):
        state = tx.init(HEAD)
        for scale, value in ((1.0, 1.0), (1.0, 1.1), (gradient, loss), (1.0, 1.0)):
            grads = jax.tree.map(lambda leaf, scale=scale: scale * leaf, HEAD)
            updates, state = tx.update(grads, state, HEAD, value=value)
        return updates, state.losses

    assert_same_bits(after(1e4, 1e6), after(1e7, 1e9))
    assert_differ(after(1e4, 1e6)[0], after(1e2, 1e6)[0])


@pytest.mark.slow
def test_chain_hands_the_loss_on():
    tx = velo(WEIGHTS, TOTAL_STEPS)
    chained = optax.chain(optax.scale(2.0), tx, optax.scale(0.5))
    doubled = jax.tree.map(lambda leaf: 2 * leaf, gradients(HEAD, 0))
    updates, _ = jax.jit(tx.update)(doubled, tx.init(HEAD), HEAD, value=2.0)
    halved = jax.tree.map(lambda leaf, change: leaf + 0.5 * change, HEAD, updates)
    assert_close(trained(chained, HEAD, steps=1).params, halved)


@pytest.mark.slow_but("groups")
@pytest.mark.parametrize("wrap", ["mask", "partition", "groups"])
def test_a_part_of_the_parameters_is_trained_as_if_alone(wrap, folder):
    is_head = {"Dense_0": {"kernel": False, "bias": False}, "head": {"kernel": True}}
    own = velo(WEIGHTS, TOTAL_STEPS)
    if wrap == "mask":
        tx = optax.chain(
            optax.masked(own, is_head),
            optax.masked(optax.sgd(0.1), jax.tree.map(lambda on: not on, is_head)),
        )
    elif wrap == "partition":
        tx = optax.partition({True: own, False: optax.sgd(0.1)}, is_head)
    else:
        config = OptimizerConfig("velo", options={"weights": str(folder)})
        groups = (ParamGroup("head/*", optimizer=config),)
        sgd = OptimizerConfig("sgd", learning_rate=0.1, schedule="constant", groups=groups)
        tx = build_optimizer(sgd, TOTAL_STEPS).tx
    result = trained(tx).params
    assert_close(result["head"], trained(own, HEAD).params["head"])
    rest = {"Dense_0": PARAMS["Dense_0"]}
    assert_close(result["Dense_0"], trained(optax.sgd(0.1), rest).params["Dense_0"])


def accumulated(tx, params=HEAD):
    """Returns the parameters after each micro-step."""
    state, trace = tx.init(params), []
    update = jax.jit(lambda g, s, p, v: tx.update(g, s, p, value=v))
    for step, value in enumerate(MICRO_STEPS):
        updates, state = update(gradients(HEAD, step), state, params, value)
        params = optax.apply_updates(params, updates)
        trace.append(params)
    return trace, state


@pytest.mark.slow
def test_long_runs_accumulate_gradients_and_losses_as_the_original_does():
    by_hand, params = velo(WEIGHTS, 3), HEAD
    state = by_hand.init(params)
    for step in (0, 2, 4):
        pair = [gradients(HEAD, step), gradients(HEAD, step + 1)]
        grads = jax.tree.map(lambda *both: sum(both) / 2, *pair)
        value = sum(MICRO_STEPS[step : step + 2]) / 2
        updates, state = jax.jit(by_hand.update)(grads, state, params, value=value)
        params = optax.apply_updates(params, updates)
    trace, last = accumulated(velo(WEIGHTS, 6, accumulate_above=5, weight_decay=0.0))
    assert_close(trace[-1], params)
    assert_close(last.inner, state)
    assert_same_bits(trace[0], HEAD)
    assert_same_bits(trace[2], trace[1])
    last_losses = optax.MultiSteps(velo(WEIGHTS, 3), 2).gradient_transformation()
    assert_differ(accumulated(last_losses)[0][-1], params)


def test_accumulation_begins_above_150000_steps(monkeypatch):
    assert isinstance(velo(WEIGHTS, 150_000).init(HEAD), VeloState)
    given = []
    monkeypatch.setattr(
        "distaff.optim.learned.optimizer.accumulate",
        lambda tx, every, tail: given.append(every) or accumulate(tx, every),
    )
    for steps in (150_001, 300_000, 300_001):
        velo(WEIGHTS, steps)
    assert given == [2, 2, 3]


@pytest.mark.slow
def test_vmap_over_seeds_equals_separate_runs():
    tx = velo(WEIGHTS, TOTAL_STEPS)

    def run(seed):
        params = {"w": jax.random.normal(jax.random.fold_in(jax.random.key(0), seed), (4, 3))}
        state = tx.init(params)
        for step in range(3):
            value = jnp.square(params["w"]).mean()
            updates, state = tx.update(gradients(params, step), state, params, value=value)
            params = optax.apply_updates(params, updates)
        return params, state

    together = jax.jit(jax.vmap(run))(jnp.arange(3))
    alone = jax.jit(run)
    for seed in range(3):
        own = jax.tree.map(lambda leaf, seed=seed: leaf[seed], together)
        assert_close(own, alone(jnp.int32(seed)), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    tx = velo(WEIGHTS, 2 * TOTAL_STEPS, weight_decay=0.01, accumulate_above=TOTAL_STEPS)
    update = jax.jit(
        lambda s: s.apply_gradients(grads=gradients(s.params, s.step), value=1.0 / (1 + s.step))
    )
    state = TrainState.create(params=HEAD, tx=tx)
    for step in range(8):
        if step == 3:  # between two updates, with a gradient in hand
            with CheckpointStore(tmp_path) as store:
                store.save(3, state.arrays(), {})
        state = update(state)
    fresh = TrainState.create(params=jax.tree.map(jnp.zeros_like, HEAD), tx=tx)
    resumed = fresh.replace(**CheckpointStore(tmp_path).load(3, fresh.arrays()))
    forgetful = resumed.replace(opt_state=fresh.opt_state)
    for _ in range(5):
        resumed, forgetful = update(resumed), update(forgetful)
    assert_same_bits(resumed.arrays(), state.arrays())
    assert_differ(forgetful.params, state.params)


@pytest.mark.slow
def test_weight_decay_takes_its_fraction_off_matrices_once(folder):
    params = PARAMS["Dense_0"]
    grads = gradients(params, 0)

    def updates(tx):
        return jax.jit(tx.update)(grads, tx.init(params), params, value=1.0)[0]

    expected = updates(velo(WEIGHTS, TOTAL_STEPS))
    expected["kernel"] -= 0.25 * params["kernel"]
    config = OptimizerConfig("velo", options={"weights": str(folder)}, weight_decay=0.25)
    tx, schedule = build_optimizer(config, TOTAL_STEPS)
    assert_close(updates(tx), expected)
    assert schedule is None
    expected["bias"] -= 0.25 * params["bias"]
    assert_close(updates(velo(WEIGHTS, TOTAL_STEPS, weight_decay=0.25, mask=None)), expected)


@pytest.mark.slow
def test_weight_decay_is_once_per_update_of_a_run_that_accumulates():
    def moved(weight_decay):
        tx = velo(WEIGHTS, 6, weight_decay=weight_decay, accumulate_above=3)
        return accumulated(tx)[0][1]

    difference = jax.tree.map(lambda a, b: a - b, moved(0.0), moved(0.25))
    assert_close(difference, jax.tree.map(lambda leaf: 0.25 * leaf, HEAD), atol=1e-6)


def test_decay_is_found_where_there_is_some_and_the_network_is_no_decay():
    assert not decays(velo(WEIGHTS, TOTAL_STEPS), PARAMS)
    assert decays(velo(WEIGHTS, TOTAL_STEPS, weight_decay=1e-6), PARAMS)
    assert decays(velo(WEIGHTS, 6, weight_decay=1e-6, accumulate_above=3), PARAMS)
    assert decays(optax.chain(velo(WEIGHTS, 6), optax.add_decayed_weights(-1e-6)), PARAMS)


@pytest.mark.slow
def test_the_penalty_in_the_loss_is_the_originals_decay_and_not_beside_the_own_one():
    def loss_fn(params, batch, ctx: Context):
        ctx.add_l2_loss(params, 0.5)
        return jnp.square(params["head"]["kernel"] - batch["x"]).mean()

    batch = {"x": jnp.ones([3, 2])}
    state = TrainState.create(params=HEAD, tx=velo(WEIGHTS, TOTAL_STEPS))
    penalized, _ = jax.jit(train_step(loss_fn))(state, batch)

    def objective(params):
        loss = jnp.square(params["head"]["kernel"] - 1).mean()
        return loss + 0.25 * jnp.square(params["head"]["kernel"]).sum()

    value, grads = jax.value_and_grad(objective)(HEAD)
    assert_close(penalized.params, state.apply_gradients(grads=grads, value=value).params)
    decaying = TrainState.create(params=HEAD, tx=velo(WEIGHTS, TOTAL_STEPS, weight_decay=0.1))
    with pytest.raises(ConfigError, match="Decay is in one place"):
        train_step(loss_fn)(decaying, batch)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = True):
        return nn.Dense(2)(x)


class Regression(TrainerModule):
    def loss_fn(self, params, batch, ctx):
        error = ctx.apply(params, batch["x"]) - batch["y"]
        return jnp.square(error).mean(axis=-1)


def make_loader():
    x = np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32)
    return ArrayLoader({"x": x, "y": np.sin(x[:, :2])}, 8)


@pytest.mark.slow
@pytest.mark.parametrize("debug", [False, True])
def test_trainer_trains_with_it_and_a_model_is_loaded_without_its_weights(folder, debug):
    options = {"weights": str(folder)}
    trainer = Regression(
        Net(),
        optimizer=OptimizerConfig("velo", options=options, weight_decay=1e-6, clip_norm=1.0),
        enable_progress_bar=False,
        log_every_n_steps=1,
        debug=debug,
    )
    loader = make_loader()
    result = trainer.train_model(loader, loader, loader, num_epochs=2)
    assert (result.status, result.step) == ("finished", 6)
    record = json.loads((result.path / "config.json").read_text())
    assert record["optimizer"]["options"] == options
    assert "learning_rate" not in (result.path / "metrics.jsonl").read_text()
    shutil.rmtree(folder)
    loaded = Regression.load_from_checkpoint(result.path)
    assert loaded.optimizer == trainer.optimizer
    assert_same_bits(loaded.predict(loader), trainer.predict(loader))
    with pytest.raises(CheckpointError, match=r"velo/config.gin cannot be read"):
        loaded.train_model(loader, num_epochs=1)


def test_a_function_of_the_number_of_steps_makes_it(folder):
    tx = build_optimizer(lambda total_steps: velo(folder, total_steps), TOTAL_STEPS).tx
    assert_same_bits(tx.init(HEAD), velo(WEIGHTS, TOTAL_STEPS).init(HEAD))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"params": HEAD}, LossError, r"got no `value`\. Pass it: tx.update\(.*value=loss"),
        ({"params": HEAD, "value": jnp.ones(3)}, LossError, r"a `value` of shape \(3,\)"),
        ({"value": 1.0}, StateError, r"VeLO needs the parameters"),
    ],
)
def test_update_refuses(arguments, error, message):
    tx = velo(WEIGHTS, TOTAL_STEPS)
    with pytest.raises(error, match=message):
        tx.update(HEAD, tx.init(HEAD), **arguments)


def test_a_state_without_a_loss_is_told_to_pass_it():
    state = TrainState.create(params=HEAD, tx=velo(WEIGHTS, TOTAL_STEPS))
    with pytest.raises(LossError, match=r"state.apply_gradients\(grads=grads, value=loss\)"):
        state.apply_gradients(grads=HEAD)


@pytest.mark.parametrize(
    ("weights", "total_steps", "options", "message"),
    [
        (WEIGHTS, 0, {}, r"total_steps of VeLO must be an int >= 1; got 0"),
        (WEIGHTS, 1.5, {}, r"got 1\.5"),
        (WEIGHTS, 10, {"accumulate_above": 0}, r"accumulate_above of VeLO .*; got 0"),
        (WEIGHTS, 10, {"weight_decay": -1.0}, r"weight_decay must be .*; got -1\.0"),
        (WEIGHTS, 10, {"weight_decay": float("nan")}, r"weight_decay must be .*; got nan"),
        (3, 10, {}, r"weights must be a folder, or VeloWeights; got 3"),
    ],
)
def test_velo_refuses(weights, total_steps, options, message):
    with pytest.raises(ConfigError, match=message):
        velo(weights, total_steps, **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"options": {}}, r"\['weights'\]\. .*`config.gin` from gs://gresearch/"),
        ({"options": {"weights": Path("a")}}, r"options\['weights'\] is PosixPath"),
        ({"options": {"weights": "a", "total_steps": 3}}, r"no option 'total_steps'"),
        ({"learning_rate": 0.1}, r"without a learning rate .* learning_rate is 0\.1\. Leave"),
        ({"schedule": "linear"}, r"schedule is 'linear'\. Leave it at its default, 'cosine'"),
        ({"warmup_steps": 3}, r"warmup_steps is 3"),
        ({"end_fraction": 0.5}, r"end_fraction is 0\.5"),
        (
            {"groups": (ParamGroup("*", learning_rate=0.1),)},
            r"no learning rate, .*'\*'.*the optimizer of the group",
        ),
    ],
    ids=str,
)
def test_a_config_refuses(fields, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig("velo", **{"options": {"weights": "/folder"}, **fields})


def test_a_config_needs_the_number_of_steps_before_it_reads_the_folder():
    config = OptimizerConfig("velo", options={"weights": "/nowhere"})
    with pytest.raises(ConfigError, match=r"needs the number of steps .* no length"):
        build_optimizer(config, None)
    with pytest.raises(CheckpointError, match=r"/nowhere/config.gin cannot be read"):
        build_optimizer(config, TOTAL_STEPS)


def test_the_names_are_those_of_the_package():
    assert set(learned.__all__) <= set(dir(learned))

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import tyro

from distaff import TrainState
from distaff.core.config.encoding import from_json, to_json
from distaff.errors import ConfigError
from distaff.optim import OptimizerConfig, ParamGroup, build_optimizer, decay_mask

TOTAL_STEPS = 20
PARAMS = {
    "encoder": {"kernel": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "bias": jnp.ones(3)},
    "head": {"kernel": jnp.linspace(0.5, 2.0, 6).reshape(3, 2), "bias": -jnp.ones(2)},
}
COSINE = {
    rate: optax.cosine_decay_schedule(rate, TOTAL_STEPS, alpha=0.01) for rate in (0.1, 0.02, 0.5)
}
BIASES_SLOW = ParamGroup("*/bias", learning_rate=0.02)
ENCODER_FROZEN = ParamGroup("encoder/*", freeze=True)


def gradients(params, step):
    return jax.tree.map(lambda leaf: jnp.sin(3 * leaf + step), params)


def trained(tx, params, steps=3):
    @jax.jit
    def update(state):
        return state.apply_gradients(grads=gradients(state.params, state.step), value=1.0)

    state = TrainState.create(params=params, tx=tx)
    for _ in range(steps):
        state = update(state)
    return state.params


def built(*groups, **options):
    config = OptimizerConfig("adamw", learning_rate=0.1, groups=groups, **options)
    return build_optimizer(config, TOTAL_STEPS).tx


def part(params, layer, leaf):
    return {layer: {leaf: params[layer][leaf]}}


def assert_close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), left, right)


def test_groups_train_each_part_as_its_own_optimizer_would():
    own = OptimizerConfig("sgd", learning_rate=0.5)
    groups = (
        ParamGroup("encoder/kernel", optimizer=optax.rmsprop(1e-2)),
        BIASES_SLOW,
        ParamGroup("head/*", optimizer=own),
    )
    by_hand = {
        ("encoder", "kernel"): optax.rmsprop(1e-2),
        ("encoder", "bias"): optax.adam(COSINE[0.02]),
        ("head", "bias"): optax.adam(COSINE[0.02]),
        ("head", "kernel"): optax.sgd(COSINE[0.5]),
    }
    result = trained(built(*groups), PARAMS)
    for (layer, leaf), tx in by_hand.items():
        assert_close(part(result, layer, leaf), trained(tx, part(PARAMS, layer, leaf)))


def test_parameters_of_no_group_are_trained_by_the_config_itself():
    result = trained(built(ENCODER_FROZEN, weight_decay=0.2), PARAMS)
    alone = optax.adamw(COSINE[0.1], weight_decay=0.2, mask=decay_mask)
    assert_close(result["head"], trained(alone, PARAMS["head"]))


@pytest.mark.parametrize("name", ["adamw", "muon", "momentum", "lamb"])
def test_decay_spares_biases_within_each_group(name):
    config = OptimizerConfig(name, weight_decay=0.2, schedule="constant", groups=(BIASES_SLOW,))
    tx = build_optimizer(config, TOTAL_STEPS).tx
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
    moved = jax.tree.map(lambda leaf: bool((leaf != 0).any()), updates)
    assert moved == decay_mask(PARAMS)


def test_frozen_parameters_keep_every_bit_and_cost_no_optimizer_state():
    params = {**PARAMS, "encoder": {"kernel": jnp.array([[-0.0, 0.0], [1e-30, jnp.nan]])}}
    tx = built(ENCODER_FROZEN, weight_decay=0.5)
    kept = trained(tx, params)["encoder"]["kernel"]
    with jax.disable_jit():  # XLA drops the addition of zero, of either sign
        eager = trained(tx, params, steps=1)["encoder"]["kernel"]
    before = np.asarray(params["encoder"]["kernel"]).tobytes()
    assert np.asarray(kept).tobytes() == np.asarray(eager).tobytes() == before
    shapes = {jnp.shape(leaf) for leaf in jax.tree.leaves(tx.init(params))}
    assert shapes == {(), (3, 2), (2,)}


def test_clipping_takes_the_norm_of_all_gradients_but_the_frozen():
    groups = (ENCODER_FROZEN, ParamGroup("*/bias", optimizer=optax.sgd(1.0)))
    config = OptimizerConfig("sgd", learning_rate=1.0, schedule="constant", clip_norm=1.0)
    tx = build_optimizer(dataclasses.replace(config, groups=groups), None).tx
    grads = jax.tree.map(lambda leaf: 100 * jnp.ones_like(leaf), PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert float(optax.tree.norm(updates["head"])) == pytest.approx(1.0)
    assert float(updates["head"]["bias"][0]) == pytest.approx(-1 / np.sqrt(8))


def test_groups_hand_extra_arguments_on():
    plateau = optax.chain(
        optax.sgd(1.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=1, cooldown=0)
    )
    tx = built(ParamGroup("head/bias", optimizer=plateau))
    grads, state, sizes = jax.tree.map(jnp.ones_like, PARAMS), tx.init(PARAMS), []
    for _ in range(5):
        updates, state = tx.update(grads, state, PARAMS, value=1.0)
        sizes.append(-float(updates["head"]["bias"][0]))
    assert sizes[0] == 1.0
    assert sizes[-1] < 1.0


def test_groups_leave_the_schedule_that_is_logged_to_the_config_itself():
    config = OptimizerConfig("sgd", learning_rate=0.1, groups=(BIASES_SLOW,))
    _, schedule = build_optimizer(config, TOTAL_STEPS)
    assert schedule is not None
    assert [float(schedule(step)) for step in (0, 7)] == [COSINE[0.1](0), COSINE[0.1](7)]


def test_patterns_are_case_sensitive_and_see_paths_through_objects():
    layer = jax.tree_util.register_dataclass(
        dataclasses.make_dataclass("Layer", ["kernel"]), ["kernel"], []
    )
    params = {"Net": [layer(jnp.ones(2)), layer(jnp.ones(2))], "net": jnp.ones(2)}
    result = trained(built(ParamGroup("Net/[01]/kernel", freeze=True)), params)
    assert result["Net"][0].kernel.tolist() == result["Net"][1].kernel.tolist() == [1, 1]
    assert result["net"].tolist() != [1, 1]


def test_a_group_without_parameters_is_refused_with_the_known_paths():
    tx = built(ParamGroup("encodr/kernel", freeze=True))
    with pytest.raises(ConfigError, match=r"'encodr/kernel' matches none. Did you mean 'encoder/k"):
        tx.init(PARAMS)
    with pytest.raises(ConfigError, match=r"'head/bias', 'head/kernel'\."):
        jax.eval_shape(tx.init, PARAMS)
    shadowed = built(ENCODER_FROZEN, ParamGroup("encoder/bias", learning_rate=0.1))
    with pytest.raises(ConfigError, match=r"'encoder/bias'\) has no effect: earlier"):
        shadowed.init(PARAMS)


def test_a_group_with_a_schedule_that_does_not_fit_the_run_is_refused():
    late = ParamGroup("*", optimizer=OptimizerConfig("sgd", warmup_steps=TOTAL_STEPS))
    with pytest.raises(ConfigError, match="warmup_steps is 20"):
        built(late)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"ParamGroup\('\*'\) must have exactly one of optimizer, .*has none"),
        ({"freeze": True, "learning_rate": 0.0}, r"has \['learning_rate', 'freeze'\]"),
        ({"learning_rate": -1.0}, r"learning_rate of ParamGroup\('\*'\) .*; got -1\.0"),
        ({"optimizer": "sgd"}, r"must be an OptimizerConfig or .*; got 'sgd'"),
        ({"optimizer": OptimizerConfig(clip_norm=1.0)}, r"Clipping, .*'clip_norm': 1\.0.*Move"),
        ({"optimizer": OptimizerConfig(groups=(BIASES_SLOW,))}, r"Clipping, .*'groups'"),
    ],
    ids=str,
)
def test_param_group_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        ParamGroup("*", **options)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("*/bias", r"groups must be a tuple of ParamGroup; got '\*/bias'"),
        (ParamGroup("*", freeze=True), r"write groups=\(ParamGroup\(\.\.\.\),\)"),
        ([{"pattern": "*"}], r"got \{'pattern': '\*'\}.*from_json"),
    ],
)
def test_optimizer_config_refuses_groups(groups, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(groups=groups)
    with pytest.raises(ConfigError, match="pattern must be a str"):
        ParamGroup("", freeze=True)


def test_groups_survive_strict_json_and_the_command_line():
    own = ParamGroup("head/*", optimizer=OptimizerConfig("lion", weight_decay=0.1))
    config = OptimizerConfig("sgd", groups=[ENCODER_FROZEN, BIASES_SLOW, own])
    text = json.dumps(to_json(config), allow_nan=False)
    assert from_json(OptimizerConfig, json.loads(text)) == config
    assert hash(config) == hash(from_json(OptimizerConfig, json.loads(text)))
    parsed = tyro.cli(OptimizerConfig, default=config, args=["--learning-rate=0.5"])
    assert parsed == dataclasses.replace(config, learning_rate=0.5)

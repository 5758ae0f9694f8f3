"""Muon by path: hidden matrices to Muon, all other parameters to AdamW."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from distaff.core.config.encoding import from_json, to_json
from distaff.errors import ConfigError
from distaff.optim import OptimizerConfig, ParamGroup, build_optimizer, muon_routes
from distaff.step.logged_rates import host_rates
from distaff.zoo import GPT
from model_kinds import KINDS

STEPS = 20
AXES = optax.contrib.MuonDimensionNumbers
CONV, QUERY = AXES((0, 1, 2), 3), AXES(0, (1, 2))


def filled(shapes):
    counter = iter(range(100))
    return jax.tree.map(
        lambda shape: 1.5 + jnp.sin(jnp.arange(np.prod(shape)) + next(counter)).reshape(shape),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


PARAMS = filled(
    {
        "embed_tokens": {"weight": (7, 4)},
        "block": {
            "up": {"kernel": (4, 6), "bias": (6,)},
            "query": {"kernel": (4, 2, 3)},
            "norm": {"weight": (2, 4)},
        },
        "conv": {"kernel": (2, 2, 3, 4)},
        "lm_head": {"kernel": (4, 7)},
    }
)


def routed(params, **options):
    """Returns the layout of each parameter that goes to Muon, by its path."""
    found = jax.tree.leaves_with_path(muon_routes(**options)(params))
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in found if x}


def test_matrices_between_embeddings_and_heads_go_to_muon():
    assert routed(PARAMS) == {"block/up/kernel": "io"}
    gpt = GPT(vocab_size=11, features=8, num_heads=2, num_layers=1)
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    params = jax.eval_shape(gpt.init, jax.random.key(0), tokens)["params"]
    names = ("query", "key", "value", "out", "up", "down")
    assert routed(params) == {f"Block_0/{name}/kernel": "io" for name in names}


@pytest.mark.parametrize(
    "name",
    [
        *("wte/weight", "Embed_0/embedding", "pos_embed", "positions", "token_table", "lm_head/w"),
        *("head/kernel", "Head_0/kernel", "classifier/kernel", "norm/scale", "proj/bias_ih"),
    ],
)
def test_embeddings_heads_scales_and_biases_go_to_adamw(name):
    params = np.ones((4, 4))
    for part in reversed(name.split("/")):
        params = {part: params}
    assert routed(params) == {}
    layout = "oi" if name.endswith("weight") else "io"
    assert routed(params, also_muon=[name]) == {name: layout}
    assert routed(params, also_muon=[name], no_muon=["*"]) == {}


@pytest.mark.slow_but("haiku-soap")
@pytest.mark.parametrize("optimizer", ["muon", "soap"])
@pytest.mark.parametrize("kind", ["equinox", "haiku"])
def test_models_of_all_kinds_get_the_same_updates(kind, optimizer):
    converted = KINDS[kind].converted
    linen = filled(
        {
            "wide": {"kernel": (3, 8), "bias": (8,)},
            "narrow": {"kernel": (8, 4), "bias": (4,)},
        }
    )
    tx = build_optimizer(OptimizerConfig(optimizer, learning_rate=0.1), STEPS).tx

    def updated(params, convert):
        state = tx.init(params)
        for step in range(3):
            grads = jax.tree.map(lambda leaf, step=step: jnp.cos(3.0 * leaf + step), linen)
            updates, state = tx.update(convert(grads), state, params)
        return updates

    expected = converted(updated(linen, lambda grads: grads))
    found = updated(converted(linen), converted)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), found, expected
    )


@pytest.mark.parametrize("name", ["MultiHeadAttention_0/w", "outhead_proj/w", "out/kernel"])
def test_names_that_only_resemble_a_head_go_to_muon(name):
    first, _, last = name.partition("/")
    assert routed({first: {last: np.ones((4, 4))}}) == {name: "io"}


def trained(tx, params=PARAMS, steps=3):
    @jax.jit
    def update(params, opt_state, step):
        grads = jax.tree.map(lambda leaf: jnp.cos(3.0 * leaf + step), params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for step in range(steps):
        params, opt_state = update(params, opt_state, step)
    return params


def assert_close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), left, right)


def rate(peak):
    return optax.cosine_decay_schedule(peak, STEPS, alpha=0.01)


def by_hand(adam_peak=None, conv=CONV, query=QUERY, **options):
    axes = jax.tree.map(lambda _: None, PARAMS)
    axes["block"]["up"]["kernel"] = AXES()
    axes["block"]["query"]["kernel"] = query
    axes["conv"]["kernel"] = conv
    return optax.contrib.muon(
        rate(0.1),
        adam_learning_rate=None if adam_peak is None else rate(adam_peak),
        muon_weight_dimension_numbers=axes,
        **options,
    )


WIDE = ("conv/kernel=iiio", "*/query/kernel=ioo")


@pytest.mark.parametrize("adam_peak", [None, 0.02])
@pytest.mark.slow
def test_the_routed_optimizer_equals_optax_with_its_axes_given_by_hand(adam_peak):
    options = {"beta": 0.9, "adam_b2": 0.95}
    own = options if adam_peak is None else {**options, "adam_learning_rate": adam_peak}
    config = OptimizerConfig("muon", learning_rate=0.1, also_muon=WIDE, options=own)
    built = trained(build_optimizer(config, STEPS).tx)
    assert_close(built, trained(by_hand(adam_peak, **options)))
    plain = dataclasses.replace(config, also_muon=())
    assert_close(
        trained(build_optimizer(plain, STEPS).tx),
        trained(by_hand(adam_peak, conv=None, query=None, **options)),
    )


def test_matrices_stacked_over_layers_are_orthogonalized_one_by_one():
    one, two = filled({"w": (4, 6)}), filled({"w": (4, 6)})
    two = jax.tree.map(lambda leaf: leaf * 2 + 1, two)
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), one, two)
    config = OptimizerConfig("muon", learning_rate=0.1)
    each = [trained(build_optimizer(config, STEPS).tx, params)["w"] for params in (one, two)]
    both = dataclasses.replace(config, also_muon=["w=bio"])
    found = trained(build_optimizer(both, STEPS).tx, stacked)["w"]
    assert_close(found, jnp.stack(each))


@pytest.mark.slow
def test_each_part_decays_with_its_own_rate_and_spares_biases_and_scales():
    config = OptimizerConfig(
        "muon",
        learning_rate=0.1,
        weight_decay=0.5,
        schedule="constant",
        options={"adam_learning_rate": 0.02},
    )
    tx = build_optimizer(config, STEPS).tx
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
    decays = jax.tree.map(lambda update, leaf: float(-(update / leaf).mean()), updates, PARAMS)
    assert decays["block"]["up"] == {"kernel": pytest.approx(0.05), "bias": 0}
    assert decays["block"]["norm"]["weight"] == 0
    for name in ("embed_tokens", "lm_head"):
        (decay,) = decays[name].values()
        assert decay == pytest.approx(0.01)
    assert decays["block"]["query"]["kernel"] == pytest.approx(0.01)


def rates_of(config, params=PARAMS):
    found = host_rates(build_optimizer(config, STEPS).tx, params, None)
    return {} if found is None else {name: round(rate, 6) for name, rate in found(0).items()}


def test_each_part_has_a_learning_rate_in_the_log():
    muon = OptimizerConfig("muon", learning_rate=0.1, options={"adam_learning_rate": 0.02})
    assert rates_of(muon) == {"learning_rate": 0.1, "learning_rate/adam": 0.02}
    alike = dataclasses.replace(muon, options={})
    assert rates_of(alike) == {"learning_rate": 0.1, "learning_rate/adam": 0.1}
    assert rates_of(muon, {"w": jnp.ones((2, 2))}) == {"learning_rate": 0.1}
    grouped = OptimizerConfig(
        "adamw", learning_rate=0.3, groups=(ParamGroup("block/*", optimizer=muon),)
    )
    assert rates_of(grouped) == {
        "learning_rate": 0.3,
        "learning_rate/block": 0.1,
        "learning_rate/block/adam": 0.02,
    }


def test_groups_leave_the_routes_of_the_other_parameters_as_they_are():
    muon = OptimizerConfig("muon", learning_rate=0.1, also_muon=WIDE)
    grouped = dataclasses.replace(muon, groups=(ParamGroup("lm_head/*", freeze=True),))
    found = trained(build_optimizer(grouped, STEPS).tx)
    expected = trained(by_hand())
    np.testing.assert_array_equal(found["lm_head"]["kernel"], PARAMS["lm_head"]["kernel"])
    assert_close({**found, "lm_head": 0}, {**expected, "lm_head": 0})


def test_a_matrix_of_lora_keeps_its_route_if_the_other_one_goes_to_adamw():
    params = filled({"lora": {"a": (4, 2), "b": (2, 4)}})
    config = OptimizerConfig("muon", learning_rate=0.1, no_muon=["*/a"])
    assert routed(params, no_muon=["*/a"]) == {"lora/b": "io"}
    trained(build_optimizer(config, STEPS).tx, params)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adamw", "no_muon": ("x",)}, r"belong to the optimizer 'muon'.*use groups"),
        ({"also_muon": "conv"}, r"also_muon must be a tuple"),
        ({"also_muon": ("conv=iio?",)}, r"a letter for each axis.*'conv=iio\?'"),
        ({"also_muon": ("conv=bbi",)}, r"one i and one o"),
        ({"options": {"adam_learning_rate": "fast"}}, r"must be a number"),
    ],
)
def test_wrong_fields_raise(fields, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**{"name": "muon", **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"no_muon": ("lm_heat/*",)}, r"no_muon must match .*'lm_heat/\*' matches none"),
        ({"also_muon": ("cov/*=iiio",)}, r"also_muon must match .*'cov/\*' matches none"),
        ({"also_muon": ("conv/*",)}, r"'conv/kernel' as 'io'.*\[2, 2, 3, 4\].*'=iiio'"),
        ({"also_muon": ("*/bias",)}, r"'block/up/bias' as 'io'.*Biases and scales"),
    ],
)
def test_patterns_that_do_not_fit_the_parameters_raise(fields, message):
    config = OptimizerConfig("muon", **fields)
    with pytest.raises(ConfigError, match=message):
        build_optimizer(config, STEPS).tx.init(PARAMS)


def test_patterns_survive_strict_json():
    config = OptimizerConfig("muon", no_muon=("a/*",), also_muon=["b=bio"])
    assert from_json(OptimizerConfig, json.loads(json.dumps(to_json(config)))) == config

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import math
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.core.config.encoding import override
from distaff.errors import ConfigError, leaf_name
from distaff.optim import (
    OptimizerConfig,
    ParamGroup,
    build_optimizer,
    catalog,
    decay_mask,
    make_schedule,
)

TOTAL_STEPS = 20
PARAMS = {
    "Dense_0": {"kernel": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "bias": jnp.ones(3)},
    "Conv_0": {"kernel": jnp.linspace(0.5, 2.0, 24).reshape(2, 2, 3, 2)},
    "LayerNorm_0": {"scale": jnp.full(3, 2.0), "bias": jnp.full(3, -0.5)},
}
MASK = {
    "Dense_0": {"kernel": True, "bias": False},
    "Conv_0": {"kernel": True},
    "LayerNorm_0": {"scale": False, "bias": False},
}


def three_steps(tx: optax.GradientTransformation) -> dict:
    """Parameters after three updates with gradients that differ at every step and leaf."""

    def update(params, opt_state, step):
        grads = jax.tree.map(lambda leaf: jnp.sin(3.0 * leaf + step), params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = PARAMS, tx.init(PARAMS)
    for step in range(3):
        params, opt_state = update(params, opt_state, step)
    return params


def assert_same_training(config: OptimizerConfig, by_hand: optax.GradientTransformation) -> None:
    built = three_steps(build_optimizer(config, TOTAL_STEPS).tx)
    jax.tree.map(
        lambda left, right: np.testing.assert_allclose(left, right, rtol=2e-6, atol=1e-7),
        built,
        three_steps(by_hand),
    )


COSINE = optax.cosine_decay_schedule(0.1, TOTAL_STEPS, alpha=0.01)


@pytest.mark.parametrize(
    ("config", "by_hand"),
    [
        (OptimizerConfig("sgd", learning_rate=0.1), optax.sgd(COSINE)),
        (OptimizerConfig("momentum", learning_rate=0.1), optax.sgd(COSINE, momentum=0.9)),
        (
            OptimizerConfig(
                "momentum", learning_rate=0.1, options={"momentum": 0.5, "nesterov": True}
            ),
            optax.sgd(COSINE, momentum=0.5, nesterov=True),
        ),
        (
            OptimizerConfig("momentum", learning_rate=0.1, weight_decay=0.2),
            optax.chain(optax.add_decayed_weights(0.2, MASK), optax.sgd(COSINE, momentum=0.9)),
        ),
        (OptimizerConfig("rmsprop", learning_rate=0.1), optax.rmsprop(COSINE)),
        (OptimizerConfig("adam", learning_rate=0.1), optax.adam(COSINE)),
        (
            OptimizerConfig("adamw", learning_rate=0.1, options={"b1": 0.5}),
            optax.adam(COSINE, b1=0.5),
        ),
        (
            OptimizerConfig("adamw", learning_rate=0.1, weight_decay=0.2),
            optax.adamw(COSINE, weight_decay=0.2, mask=MASK),
        ),
        (
            OptimizerConfig("lamb", learning_rate=0.1, weight_decay=0.2),
            optax.lamb(COSINE, weight_decay=0.2, mask=MASK),
        ),
        (
            OptimizerConfig("lion", learning_rate=0.1),
            optax.lion(COSINE, weight_decay=0.0),
        ),
        (
            OptimizerConfig("lion", learning_rate=0.1, weight_decay=0.2),
            optax.lion(COSINE, weight_decay=0.2, mask=MASK),
        ),
        (OptimizerConfig("muon", learning_rate=0.1), optax.contrib.muon(COSINE)),
        (OptimizerConfig("adafactor", learning_rate=0.1), optax.adafactor(COSINE)),
        (
            OptimizerConfig("adafactor", learning_rate=0.1, weight_decay=0.2),
            optax.adafactor(COSINE, weight_decay_rate=0.2, weight_decay_mask=MASK),
        ),
        (
            OptimizerConfig("lars", learning_rate=0.1, weight_decay=0.2),
            optax.lars(COSINE, weight_decay=0.2, weight_decay_mask=MASK),
        ),
        (
            OptimizerConfig("sgd", learning_rate=0.1, clip_value=0.6, clip_norm=1.5),
            optax.chain(optax.clip(0.6), optax.clip_by_global_norm(1.5), optax.sgd(COSINE)),
        ),
        (
            OptimizerConfig("sm3", learning_rate=0.1, schedule="constant"),
            optax.sm3(0.1),
        ),
    ],
    ids=lambda value: value.name if isinstance(value, OptimizerConfig) else "",
)
@pytest.mark.slow
def test_build_optimizer_equals_optax_by_hand(config, by_hand):
    assert_same_training(config, by_hand)


def test_build_optimizer_decays_every_kernel_and_nothing_else_with_muon():
    all_decayed = optax.contrib.muon(COSINE, weight_decay=0.2, adam_weight_decay=0.2)
    none_decayed = optax.contrib.muon(COSINE)
    labels = jax.tree.map(lambda decays: "decayed" if decays else "plain", MASK)
    assert_same_training(
        OptimizerConfig("muon", learning_rate=0.1, weight_decay=0.2),
        optax.partition({"decayed": all_decayed, "plain": none_decayed}, labels),
    )


def test_catalog_optimizers_without_masked_decay_do_not_decay_by_default():
    for name, function in catalog.optimizers().items():
        for argument, parameter in inspect.signature(function).parameters.items():
            if "weight_decay" in argument and catalog.mask_argument(name) is None:
                assert not parameter.default, (name, argument)


@pytest.mark.parametrize("name", sorted(catalog.optimizers()))
def test_build_optimizer_makes_a_step_with_every_name_of_optax(name):
    options = {
        "noisy_sgd": {"key": 0},
    }.get(name, {})
    schedule = "constant" if name in catalog.FIXED_RATE else "cosine"
    grads = PARAMS
    loss = optax.tree.norm

    def one_step(params):
        state = tx.init(params)
        extra = {"value": loss(params), "grad": grads, "value_fn": loss}
        if name == "sophia":
            extra["obj_fn"] = loss
        updates, _ = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        config = OptimizerConfig(
            name,
            schedule=schedule,
            options=options,
            weight_decay=0.1 if catalog.takes_weight_decay(name) else 0.0,
        )
        tx = build_optimizer(config, TOTAL_STEPS).tx
        stepped = jax.eval_shape(one_step, PARAMS)
    assert jax.tree.map(jnp.shape, stepped) == jax.tree.map(jnp.shape, PARAMS)


class NormedNet(nn.Module):
    @nn.compact
    def __call__(self, images):
        hidden = nn.BatchNorm(use_running_average=False)(nn.Conv(4, (3, 3))(images))
        hidden = hidden.reshape(hidden.shape[0], -1, 4)
        hidden = nn.LayerNorm()(nn.MultiHeadDotProductAttention(num_heads=2)(hidden))
        return nn.Dense(3)(hidden.mean(axis=1))


def test_decay_mask_selects_kernels_of_a_linen_model():
    params = jax.eval_shape(NormedNet().init, jax.random.key(0), jnp.ones([2, 4, 4, 1]))["params"]
    mask = jax.tree_util.tree_flatten_with_path(decay_mask(params))[0]
    attention = "MultiHeadDotProductAttention_0"
    assert params[attention]["query"]["bias"].ndim == 2
    decayed = {jax.tree_util.keystr(path, simple=True, separator="/") for path, on in mask if on}
    assert decayed == {
        "Conv_0/kernel",
        "Dense_0/kernel",
        *(f"{attention}/{part}/kernel" for part in ("query", "key", "value", "out")),
    }


def test_decay_mask_reads_attribute_and_sequence_keys():
    layer = jax.tree_util.register_dataclass(
        dataclasses.make_dataclass("Layer", ["weight", "bias"]),
        data_fields=["weight", "bias"],
        meta_fields=[],
    )
    mask = decay_mask([layer(np.ones([2, 2]), np.ones([2, 1])), np.ones([3, 3]), np.ones(3)])
    assert (mask[0].weight, mask[0].bias, mask[1], mask[2]) == (True, False, True, False)


def decayed(params, mask=decay_mask):
    return {
        name
        for path, on in jax.tree.leaves_with_path(mask(params))
        if (name := leaf_name(path)) and on
    }


STACKED = {
    "norm": {"gamma": np.ones((3, 4)), "beta": np.ones((3, 4)), "offset": np.ones((3, 4))},
    "linear": {"w": np.ones((3, 4, 4)), "b": np.ones((3, 4))},
    "rnn": {"weight_ih": np.ones((3, 8, 4)), "bias_ih": np.ones((3, 8))},
    "ln_1": {"weight": np.ones((3, 4))},
    "square": {"weight": np.ones((4, 4)), "bias": np.ones(4)},
    "plain": {"weight": np.ones((3, 4)), "bias": np.ones((3, 4))},
    "adapter": {"a": np.ones((4, 2)), "b": np.ones((2, 4))},
    "mixer": {"lora_b": np.ones((2, 4)), "layerScale": np.ones((3, 4))},
    "embedding": np.ones((8, 4)),
}


def test_decay_mask_spares_biases_and_scales_stacked_over_layers():
    assert decayed(STACKED) == {
        *("linear/w", "rnn/weight_ih", "square/weight", "adapter/a", "adapter/b", "mixer/lora_b"),
        "embedding",
    }


@pytest.mark.slow
def test_patterns_add_to_what_is_decayed_and_take_away_from_it():
    config = OptimizerConfig(
        "adamw",
        weight_decay=0.5,
        no_decay=("embedding", "*/w"),
        also_decay=["norm/*", "*/b", "*/w"],
    )
    tx = build_optimizer(config, TOTAL_STEPS).tx
    params = jax.tree.map(jnp.asarray, STACKED)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    moved = {leaf_name(path) for path, leaf in jax.tree.leaves_with_path(updates) if leaf.any()}
    more = {"norm/gamma", "norm/beta", "norm/offset", "linear/b"}
    assert moved == (decayed(STACKED) | more) - {"embedding", "linear/w"}


@pytest.mark.parametrize("option", ["no_decay", "also_decay"])
@pytest.mark.parametrize("where", ["config", "group"])
def test_a_pattern_of_decay_that_matches_nothing_is_refused(option, where):
    config = OptimizerConfig("adamw", weight_decay=0.1, **{option: ("*/bais",)})
    if where == "group":
        config = OptimizerConfig("adamw", groups=(ParamGroup("Dense_0/*", optimizer=config),))
    with pytest.raises(ConfigError, match=rf"{option} must match .*'\*/bais' matches none.*bias"):
        build_optimizer(config, TOTAL_STEPS).tx.init(PARAMS)


@pytest.mark.parametrize(
    ("name", "rate", "schedule"),
    [
        *(("adamw", 1e-3, "cosine"), ("prodigy", 1.0, "cosine"), ("momo_adam", 0.01, "cosine")),
        *(("adadelta", 1.0, "cosine"), ("schedule_free_adamw", 0.0025, "constant")),
        *(("lbfgs", 1.0, "constant"), ("schedule_free_sgd", 1.0, "constant")),
    ],
)
def test_rate_and_schedule_follow_the_name_until_they_are_given(name, rate, schedule):
    renamed = dataclasses.replace(OptimizerConfig("sgd"), name=name)
    for config in (OptimizerConfig(name), renamed, override(OptimizerConfig(), {"name": name})):
        assert (config.learning_rate, config.schedule) == (rate, schedule)
    given = dataclasses.replace(OptimizerConfig(learning_rate=0.5, schedule="linear"), name=name)
    assert (given.learning_rate, given.schedule) == (0.5, "linear")


def test_optimizer_config_takes_scalars_of_numpy_and_jax():
    config = OptimizerConfig(
        learning_rate=np.float32(0.5),
        warmup_steps=np.int64(3),
        clip_norm=jnp.float32(2.0),
        options={"b1": np.array(0.5), "nesterov": np.bool_(True)},
    )
    assert config == OptimizerConfig(
        learning_rate=0.5, warmup_steps=3, clip_norm=2.0, options={"b1": 0.5, "nesterov": True}
    )
    json.dumps(dataclasses.asdict(config))


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_one_cycle_of_few_steps_rises_to_its_peak(num_steps):
    schedule = make_schedule(OptimizerConfig(learning_rate=0.5, schedule="one_cycle"), num_steps)
    rates = [float(schedule(step)) for step in range(num_steps + 1)]
    assert max(rates[:-1]) == pytest.approx(0.5)
    assert rates[0] == pytest.approx(0.5 if num_steps == 1 else 0.02)
    assert rates[-1] == pytest.approx(0.005)


@pytest.mark.parametrize("name", ["cosine", "linear", "exponential", "one_cycle", "wsd"])
def test_schedules_of_more_steps_than_int32_has_are_those_of_their_share(name):
    config = OptimizerConfig(learning_rate=0.5, schedule=name, warmup_steps=5)
    long, short = make_schedule(config, 2**32 + 5), make_schedule(config, 2**12 + 5)
    for step in (0, 1, 100, 2**11 - 1):
        share = jnp.int32(step * 2**20)
        assert float(long(5 + share)) == pytest.approx(float(short(5 + step)), rel=1e-3)


def one_cycle_by_hand(step: int, num_steps: int, peak: float, end: float) -> float:
    rise = int(0.3 * num_steps)
    start, stop, share = peak / 25, peak, step / rise
    if step >= rise:
        start, stop, share = peak, end, (step - rise) / (num_steps - rise)
    return stop + (start - stop) * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("constant", lambda step: 0.5),
        ("cosine", lambda step: 0.05 + 0.45 * (1 + math.cos(math.pi * step / 100)) / 2),
        ("linear", lambda step: 0.5 - 0.45 * step / 100),
        ("exponential", lambda step: 0.5 * 0.1 ** (step / 100)),
        ("one_cycle", lambda step: one_cycle_by_hand(step, 100, 0.5, 0.05)),
    ],
)
@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_make_schedule_equals_its_formula_after_the_warmup(name, by_hand, warmup_steps):
    config = OptimizerConfig(
        learning_rate=0.5, schedule=name, end_fraction=0.1, warmup_steps=warmup_steps
    )
    schedule = make_schedule(config, 100 + warmup_steps)
    after = [float(schedule(step + warmup_steps)) for step in range(101)]
    np.testing.assert_allclose(after, [by_hand(step) for step in range(101)], rtol=1e-5)
    rising = [float(schedule(step)) for step in range(warmup_steps)]
    expected = [by_hand(0) * step / 10 for step in range(warmup_steps)]
    np.testing.assert_allclose(rising, expected, rtol=1e-5)


@pytest.mark.parametrize("warmup_steps", [0, 1, 10])
def test_make_schedule_inverse_sqrt_needs_no_length(warmup_steps):
    knee = max(warmup_steps, 1)
    config = OptimizerConfig(learning_rate=0.5, schedule="inverse_sqrt", warmup_steps=warmup_steps)
    schedule = make_schedule(config, None)
    for step in [*range(knee, 50), 10_000]:
        assert float(schedule(step)) == pytest.approx(0.5 * math.sqrt(knee / step), rel=1e-5)


def wsd_by_hand(step, num_steps, num_decay, shape, warmup_steps):
    """The rate of arXiv:2405.18392, from 0.5 to 0.05, after `step` updates."""
    if step < warmup_steps:
        return 0.5 * step / warmup_steps
    if step <= num_steps - num_decay:
        return 0.5
    progress = min((step - (num_steps - num_decay)) / num_decay, 1.0)
    return 0.05 + 0.45 * (1 - (math.sqrt(progress) if shape == "1-sqrt" else progress))


@pytest.mark.parametrize("shape", ["1-sqrt", "linear"])
@pytest.mark.parametrize(
    ("decay_steps", "num_steps", "num_decay"),
    [(0.2, 100, 20), (0.25, 90, 22), (30, 100, 30), (1e-3, 100, 1), (0.95, 100, 90), (1, 60, 1)],
)
@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_wsd_is_stable_after_the_warmup_and_falls_in_the_last_steps(
    shape, decay_steps, num_steps, num_decay, warmup_steps
):
    config = OptimizerConfig(
        learning_rate=0.5,
        schedule="wsd",
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        decay_shape=shape,
        end_fraction=0.1,
    )
    if decay_steps == 0.95:  # longer than what the warm-up leaves
        num_decay = min(95, num_steps - warmup_steps)
    schedule = make_schedule(config, num_steps)
    rates = [float(schedule(step)) for step in range(num_steps + 2)]
    expected = [
        wsd_by_hand(step, num_steps, num_decay, shape, warmup_steps)
        for step in range(num_steps + 2)
    ]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_wsd_counts_the_updates_of_a_run_that_accumulates():
    config = OptimizerConfig(
        "sgd", learning_rate=0.5, schedule="wsd", decay_steps=2, end_fraction=0.1, accumulate=4
    )
    _, schedule = build_optimizer(config, 40)
    assert schedule is not None
    assert [round(float(schedule(step)), 3) for step in (0, 8, 9, 10)] == [0.5, 0.5, 0.182, 0.05]


SCHEDULES = ["constant", "cosine", "linear", "exponential", "inverse_sqrt", "one_cycle", "wsd"]


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(SCHEDULES),
    learning_rate=st.floats(1e-6, 10.0),
    end_fraction=st.floats(1e-3, 1.0),
    warmup_steps=st.integers(0, 40),
    rest=st.integers(1, 60),
)
@pytest.mark.slow
def test_make_schedule_peaks_at_the_learning_rate_after_a_monotone_warmup(
    name, learning_rate, end_fraction, warmup_steps, rest
):
    config = OptimizerConfig(
        learning_rate=learning_rate,
        schedule=name,
        end_fraction=end_fraction,
        warmup_steps=warmup_steps,
    )
    schedule = jax.vmap(make_schedule(config, warmup_steps + rest))
    rates = np.broadcast_to(schedule(jnp.arange(100)), 100)[: warmup_steps + rest]
    assert rates.max() == pytest.approx(learning_rate, rel=1e-5)
    assert rates.min() >= 0
    rise = np.diff(rates[: warmup_steps + 1])
    assert (rise > 0).all()


def test_build_optimizer_returns_the_schedule_that_it_applies():
    config = OptimizerConfig("sgd", learning_rate=0.1, warmup_steps=4)
    tx, schedule = build_optimizer(config, TOTAL_STEPS)
    assert schedule is not None
    opt_state = tx.init(jnp.ones(()))
    for step in range(6):
        update, opt_state = tx.update(jnp.ones(()), opt_state, jnp.ones(()), value=0.0)
        assert update == pytest.approx(-float(schedule(step)))


def test_build_optimizer_takes_a_transformation_as_it_is():
    given_tx = optax.GradientTransformation(
        lambda params: (), lambda updates, state, params=None: (updates, state)
    )
    tx, schedule = build_optimizer(given_tx, None)
    assert schedule is None
    assert tx.init is given_tx.init
    assert tx.update(2.0, (), value=1.0, grad=2.0) == (2.0, ())


def test_build_optimizer_hands_total_steps_to_a_factory():
    tx, schedule = build_optimizer(lambda total_steps: optax.sgd(1.0 / total_steps), 10)
    update, _ = tx.update(jnp.ones(()), tx.init(jnp.ones(())))
    assert update == pytest.approx(-0.1)
    assert schedule is None
    config = OptimizerConfig("sgd", learning_rate=0.5, schedule="linear", end_fraction=0.0)
    _, schedule = build_optimizer(lambda total_steps: config, 10)
    assert schedule is not None
    assert float(schedule(5)) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("optimizer", "total_steps", "message"),
    [
        ("adamw", 10, r"OptimizerConfig, an optax.*function.*Did you mean OptimizerConfig\('adamw"),
        (3, 10, r"got 3\.$"),
        (optax.adam, 10, r"'adam' itself.*OptimizerConfig\('adam'\)"),
        (lambda total_steps: None, 10, r"must return .*returned None"),
        (lambda total_steps: optax.sgd(0.1), None, r"steps_per_epoch"),
        (OptimizerConfig(), None, r"'cosine' needs .*steps_per_epoch"),
        (OptimizerConfig(warmup_steps=10), 10, r"warmup_steps is 10, .* 10 optimizer steps"),
        (OptimizerConfig(schedule="constant", warmup_steps=11), 10, r"warmup_steps is 11"),
        (
            OptimizerConfig(schedule="wsd", warmup_steps=4, decay_steps=7),
            10,
            r"warmup_steps is 4 and decay_steps 7, but the run has 10 .* a fraction such as 0\.2",
        ),
    ],
)
def test_build_optimizer_refuses(optimizer, total_steps, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(optimizer, total_steps)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": -1.0}, r"learning_rate .*-1\.0"),
        ({"learning_rate": math.nan}, r"learning_rate .*nan"),
        ({"learning_rate": True}, r"learning_rate .*True"),
        ({"weight_decay": math.inf}, r"weight_decay .*inf"),
        ({"end_fraction": 1.5}, r"end_fraction .*1\.5"),
        ({"clip_norm": 0.0}, r"clip_norm .*None"),
        ({"clip_value": -1.0}, r"clip_value .*-1\.0"),
        ({"warmup_steps": -1}, r"warmup_steps .*-1"),
        ({"warmup_steps": 1.0}, r"warmup_steps .*1\.0"),
        ({"name": "AdamWW"}, r"'AdamWW'. Did you mean 'adamw'"),
        ({"name": "scale_by_rprop"}, r"No optimizer"),
        ({"schedule": "cosin"}, r"'cosin'. Did you mean 'cosine'"),
        ({"schedule": "exponential", "end_fraction": 0.0}, r"end_fraction is 0"),
        ({"decay_shape": "sqrt"}, r"'sqrt'. Did you mean '1-sqrt'"),
        ({"decay_steps": 0}, r"int >= 1, or a fraction.*got 0\."),
        ({"decay_steps": 1.5}, r"float between 0 and 1; got 1\.5"),
        ({"decay_steps": True}, r"got True"),
        ({"cooldown_steps": 5}, r"decay_steps=\.\.\."),
        ({"options": {"betta1": 0.9}}, r"'betta1'.*'b1'"),
        ({"name": "sgd", "options": {"nestrov": True}}, r"Did you mean 'nesterov'"),
        ({"options": {"learning_rate": 0.1}}, r"Set learning_rate instead"),
        ({"options": {"weight_decay": 0.1}}, r"Set weight_decay instead"),
        ({"options": {"mask": None}}, r"'mask'.*Set weight_decay instead"),
        ({"name": "muon", "options": {"adam_weight_decay": 0.1}}, r"Set weight_decay instead"),
        ({"options": {"b1": math.nan}}, r"options\['b1'\] is nan"),
        ({"name": "prodigy", "options": {"betas": (0.9, 0.99)}}, r"options\['betas'\]"),
        ({"options": None}, r"options must be a mapping"),
        ({"name": "dpsgd", "options": {"seed": 0}}, r"gradient of each example.*create_functions"),
        ({"options": {"b1": "0.9"}}, r"'b1'\] .*must be a number from 0.*'0\.9'|must be a number"),
        ({"options": {"b1": None}}, r"must be a number; got None"),
        ({"options": {"b1": 2.0}}, r"from 0 to less than 1; got 2\.0"),
        ({"options": {"eps": -1e-8}}, r"at least 0; got -1e-08"),
        ({"options": {"mu_dtype": "bfloat17"}}, r"name of a dtype"),
        ({"name": "sgd", "options": {"nesterov": "no"}}, r"True or False; got 'no'"),
        ({"name": "sgd", "options": {"momentum": "0.9"}}, r"must be a number"),
        ({"name": "galore", "options": {"rank": 0}}, r"an int, at least 1; got 0"),
        ({"name": "galore", "options": {"rank": 2.0}}, r"an int, at least 1; got 2\.0"),
        ({"name": "prodigy", "options": {"weight_decay": 0.1}}, r"all parameters or none"),
        ({"no_decay": "*/embedding"}, r"no_decay must be a tuple of patterns"),
        ({"name": "rprop"}, r"fixed learning rate.*'constant'"),
        ({"name": "adam", "weight_decay": 0.1}, r'1711\.05101.*"adamw", weight_decay=0\.1'),
        ({"name": "rmsprop", "weight_decay": 0.1}, r"'rmsprop'.*0\.1.*adamw.*momentum.*muon.*sgd"),
        ({"name": "prodigy", "weight_decay": 0.1}, r"'prodigy'"),
    ],
    ids=str,
)
def test_optimizer_config_refuses(fields, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**fields)


def test_optimizer_config_survives_strict_json():
    config = OptimizerConfig("lion", learning_rate=3e-4, clip_norm=1, options={"mu_dtype": None})
    text = json.dumps(dataclasses.asdict(config), allow_nan=False)
    assert OptimizerConfig(**json.loads(text)) == config
    assert hash(config) == hash(OptimizerConfig(**json.loads(text)))


def test_optimizer_config_keeps_its_own_options():
    options = {"b1": 0.5}
    config = OptimizerConfig("adamw", options=options)
    options["b1"] = 0.9
    assert config.options == {"b1": 0.5}


def test_optimizer_config_is_parsed_by_tyro():
    @dataclasses.dataclass(frozen=True)
    class Recipe:
        optimizer: OptimizerConfig = dataclasses.field(
            default_factory=lambda: OptimizerConfig("adamw", warmup_steps=50)
        )

    arguments = ["--learning-rate=1e-3", "--schedule=linear", "--clip-norm=1", "--name=muon"]
    assert tyro.cli(OptimizerConfig, args=arguments) == OptimizerConfig(
        "muon", learning_rate=1e-3, schedule="linear", clip_norm=1.0
    )
    values = {"ns_steps": "3", "beta": "0.9", "nesterov": "False", "mu_dtype": "bfloat16"}
    typed = ["--name", "muon", "--options", *itertools.chain.from_iterable(values.items())]
    options = tyro.cli(OptimizerConfig, args=typed).options
    assert options == {"ns_steps": 3, "beta": 0.9, "nesterov": False, "mu_dtype": "bfloat16"}
    assert isinstance(options["ns_steps"], int)
    assert options["nesterov"] is False
    nested = tyro.cli(Recipe, args=["--optimizer.learning-rate", "2e-3"])
    assert nested.optimizer == OptimizerConfig("adamw", warmup_steps=50, learning_rate=2e-3)

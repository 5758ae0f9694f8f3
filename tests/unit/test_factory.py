"""Optimizers of other packages, by the name of the function that builds them."""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distaff
from distaff import OptimizerConfig, data
from distaff.core.config.encoding import from_json, to_json
from distaff.errors import ConfigError
from distaff.optim import ParamGroup, build_optimizer, decay_mask
from distaff.step.logged_rates import host_rates

STEPS = 20
PARAMS = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "bias": jnp.ones(3)}
COSINE = optax.cosine_decay_schedule(0.1, STEPS, alpha=0.01)
MODULE = '''
import optax

def whole(learning_rate, b1=0.9, *, weight_decay=1e-4, mask=None):
    """Weight decay by mask."""
    return optax.adamw(learning_rate, b1=b1, weight_decay=weight_decay, mask=mask)

def own_decay(learning_rate, weight_decay=0.0):
    return optax.adamw(learning_rate, weight_decay=weight_decay)

def without_rate(scale=0.5):
    return optax.sgd(scale)

def by_length(total_steps, learning_rate=1.0):
    return optax.chain(optax.scale(1 / total_steps), optax.sgd(learning_rate))

def needs(learning_rate, width):
    return optax.sgd(learning_rate)

def of_number(learning_rate):
    return optax.sgd(0.5 * learning_rate)

def nothing(learning_rate):
    return None

class Family:
    plain = staticmethod(optax.sgd)

tx = optax.sgd(0.1)
NUMBER = 3
'''


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "__init__.py").write_text("")
    (tmp_path / "others" / "made.py").write_text(MODULE)
    (tmp_path / "others" / "broken.py").write_text("import not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "others"]:
        del sys.modules[name]


def trained(tx, steps=3):
    def update(params, opt_state, step):
        grads = jax.tree.map(lambda leaf: jnp.sin(3.0 * leaf + step), params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = PARAMS, tx.init(PARAMS)
    for step in range(steps):
        params, opt_state = update(params, opt_state, step)
    return params


def built(name, total_steps=STEPS, **fields):
    return build_optimizer(OptimizerConfig(f"others.made:{name}", **fields), total_steps)


MASK = decay_mask(PARAMS)


@pytest.mark.parametrize(
    ("name", "fields", "by_hand"),
    [
        ("whole", {}, optax.adamw(COSINE, weight_decay=0.0)),
        (
            "whole",
            {"weight_decay": 0.2, "options": {"b1": 0.5}},
            optax.adamw(COSINE, b1=0.5, weight_decay=0.2, mask=MASK),
        ),
        (
            "whole",
            {"weight_decay": 0.2, "no_decay": ("w",), "clip_norm": 0.1},
            optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(COSINE, weight_decay=0.0)),
        ),
        ("own_decay", {"options": {"weight_decay": 0.3}}, optax.adamw(COSINE, weight_decay=0.3)),
        ("by_length", {}, optax.sgd(lambda step: COSINE(step) / STEPS)),
        ("of_number", {"schedule": "constant"}, optax.sgd(0.05)),
        ("Family.plain", {"options": {"momentum": 0.9}}, optax.sgd(COSINE, momentum=0.9)),
    ],
)
def test_a_factory_equals_its_optimizer_by_hand(name, fields, by_hand):
    found = trained(built(name, learning_rate=0.1, **fields).tx)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), found, trained(by_hand)
    )


def test_a_factory_without_a_learning_rate_has_none_in_the_log():
    optimizer = built("without_rate", options={"scale": 0.25})
    assert optimizer.schedule is None
    assert host_rates(optimizer.tx, PARAMS, None) is None
    np.testing.assert_allclose(trained(optimizer.tx)["w"], trained(optax.sgd(0.25))["w"])


def test_the_rate_of_a_factory_is_logged_also_in_a_group():
    own = OptimizerConfig("others.made:whole", learning_rate=0.1)
    config = OptimizerConfig("adam", learning_rate=0.2, groups=(ParamGroup("w", optimizer=own),))
    rates = host_rates(build_optimizer(config, STEPS).tx, PARAMS, None)
    assert rates is not None
    assert rates(0) == {
        "learning_rate": pytest.approx(0.2),
        "learning_rate/w": pytest.approx(0.1),
    }


def test_a_config_imports_nothing_also_when_it_is_read_from_json():
    config = OptimizerConfig("others.made:whole", options={"b1": 0.5})
    assert from_json(OptimizerConfig, json.loads(json.dumps(to_json(config)))) == config
    assert to_json(config)["name"] == "others.made:whole"
    assert "others.made" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("others.maed:whole", r"does not find: 'others.maed'.*PYTHONPATH"),
        ("other.made:whole", r"does not find: 'other'"),
        ("others.broken:whole", r"fails to import: No module named 'not_there'"),
        ("others.made:whol", r"has no 'whol'. Did you mean 'whole'"),
        ("others.made:Family.plane", r"has no 'Family\.plane'. Did you mean 'plain'"),
        ("others.made:tx", r"must be a function that returns.*optimizer=\.\.\."),
        ("others.made:NUMBER", r"it is 3\."),
        ("others.made:nothing", r"must return an optax.GradientTransformation, and returned None"),
        ("others.made:of_number", r"a number as its learning rate only, use schedule='constant'"),
        ("others.made:needs", r"which have no default: \['width'\]"),
    ],
)
def test_a_factory_that_cannot_be_used_raises_when_it_is_built(name, message):
    config = OptimizerConfig(name)
    with pytest.raises(ConfigError, match=message):
        build_optimizer(config, STEPS)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("whole", {"options": {"b11": 0.5}}, r"no option 'b11'. Did you mean 'b1'"),
        ("whole", {"options": {"learning_rate": 1.0}}, r"the field learning_rate"),
        ("whole", {"options": {"weight_decay": 1.0}}, r"the field weight_decay"),
        ("own_decay", {"weight_decay": 0.1}, r"arguments weight_decay and mask; weight_decay is 0"),
        ("without_rate", {"learning_rate": 0.1}, r"no argument learning_rate.*'learning_rate': 0"),
        ("without_rate", {"warmup_steps": 3}, r"'warmup_steps': 3"),
        ("by_length", {"total_steps": None, "schedule": "constant"}, r"takes total_steps"),
    ],
)
def test_fields_that_a_factory_cannot_use_raise(name, fields, message):
    with pytest.raises(ConfigError, match=message):
        built(name, **fields)


@pytest.mark.parametrize("name", ["others.made:", ":whole", "others made:whole", "a:b:c", "a.:b"])
def test_a_name_of_another_form_raises_at_once(name):
    with pytest.raises(ConfigError, match=r"'package\.module:factory'"):
        OptimizerConfig(name)


def test_an_option_that_json_lacks_raises_at_once():
    with pytest.raises(ConfigError, match=r"options\['f'\]"):
        OptimizerConfig("others.made:whole", options={"f": len})


class Line(distaff.TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"]) - 1.0)


MODEL = (lambda key, x: {"w": jnp.ones(3), "b": jnp.zeros(())}, lambda p, x: x @ p["w"] + p["b"])
X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3)


def test_the_name_is_in_the_run_directory_and_loading_it_imports_nothing(tmp_path):
    config = OptimizerConfig("others.made:whole", learning_rate=0.1, options={"b1": 0.8})
    options = {"root": str(tmp_path), "enable_progress_bar": False}
    trainer = Line(MODEL, optimizer=config, **options)
    path = trainer.train_model(data.ArrayLoader({"x": X}, 4), num_epochs=1).path
    assert path is not None
    saved = json.loads((path / "config.json").read_text())["optimizer"]
    assert (saved["name"], saved["options"]) == ("others.made:whole", {"b1": 0.8})
    assert Line.load_from_checkpoint(path, model=MODEL).optimizer == config
    del sys.modules["others.made"]
    assert Line.load_from_checkpoint(path, model=MODEL).optimizer == OptimizerConfig()
    assert "others.made" not in sys.modules


def test_a_module_of_many_names_lists_the_ones_alike():
    with pytest.raises(ConfigError, match="Among others: ") as raised:
        build_optimizer(OptimizerConfig("optax:adamz"), 10)
    assert "Did you mean 'adam" in str(raised.value)
    assert len(str(raised.value)) < 400

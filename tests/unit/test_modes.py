"""How models are told whether they train, and what is said of one that does not listen."""

from __future__ import annotations

import enum
import functools
import re
from typing import Any, Literal

import equinox as eqx
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distaff import Context, TrainState
from distaff.errors import ConfigError, ModeWarning
from distaff.integrations.equinox import in_mode as equinox_in_mode
from distaff.models import as_model
from distaff.models.flags import mode_flag, names_mode, switched
from distaff.models.linen_modes import in_mode

KEY = jax.random.key(0)
X = jnp.linspace(-1, 1, 6).reshape(2, 3)


class Stage(enum.Enum):
    TRAIN = 1
    EVAL = 2


TRAIN_NAMES = ["train", "is_train", "training", "is_training", "train_mode", "enable_dropout"]
EVALUATION_NAMES = [
    *("deterministic", "use_running_average", "eval", "is_eval", "eval_mode", "inference"),
    *("is_inference", "test", "testing", "inference_mode", "is_evaluating"),
]


@pytest.mark.parametrize("default", ["", "=True", "=None"])
def test_flag_is_given_under_its_name_and_in_its_sense(default):
    for names, sense in ((TRAIN_NAMES, True), (EVALUATION_NAMES, False)):
        for name in names:
            function = eval(f"lambda x, {name}{default}: None")
            assert mode_flag(function, True, 1) == {name: sense}
            assert mode_flag(function, False, 1) == {name: not sense}
            assert names_mode([name])


def worded(x, mode="test"):
    """A function with a word for its mode."""


def worded_by_annotation(x, mode: Literal["fit", "predict"]):
    """A function whose annotation has the words."""


def worded_by_enum(x, mode: Stage = Stage.EVAL):
    """A function with an enum."""


@pytest.mark.parametrize(
    ("function", "in_training", "in_evaluation"),
    [
        (worded, "train", "test"),
        (worded_by_annotation, "fit", "predict"),
        (worded_by_enum, Stage.TRAIN, Stage.EVAL),
        (lambda x, mode: None, "train", "eval"),
    ],
)
def test_mode_is_given_as_a_word_that_the_function_knows(function, in_training, in_evaluation):
    assert mode_flag(function, True, 1) == {"mode": in_training}
    assert mode_flag(function, False, 1) == {"mode": in_evaluation}


@pytest.mark.parametrize(
    "function",
    [
        lambda x, mode="reflect": None,
        lambda x, test=0.5: None,
        lambda x, train=X: None,
        lambda train, test: None,
        lambda x, training_data=None: None,
        lambda x, *train, **kwargs: None,
    ],
)
def test_what_is_no_flag_is_left_alone(function):
    assert mode_flag(function, True, 2) == {}


def test_attribute_is_switched_if_it_is_a_flag_and_true_or_false():
    assert switched("is_training", False, True) is True
    assert switched("inference", False, False) is True
    assert switched("mode", "test", True) == "train"
    for name, value in (("use_dropout", True), ("train", None), ("train", 3), ("mode", "reflect")):
        assert switched(name, value, False) is value


class Said(nn.Module):
    train: bool = False

    def __call__(self, x):
        return self.train


@flax.struct.dataclass
class Options:
    width: int = 3
    deterministic: bool = True


class Configured(nn.Module):
    options: Options

    def __call__(self, x):
        return not self.options.deterministic


class Holder(nn.Module):
    parts: Any

    def __call__(self, x):
        return [part(x) for part in self.parts]


def test_fields_of_linen_modules_are_switched_and_frozen_parts_are_not():
    assert in_mode(Said(), True)(X) is True
    assert in_mode(Configured(Options()), True)(X) is True
    assert in_mode(Configured(Options(deterministic=False)), False)(X) is False
    shared = Said(True)
    holder = Holder((shared, Said(False), {"a": 1}, shared))
    training, evaluating = in_mode(holder, True), in_mode(holder, False)
    assert training is holder
    assert [part.train for part in (*evaluating.parts[:2], evaluating.parts[3])] == [False] * 3
    assert evaluating.parts[0] is evaluating.parts[3]
    made = in_mode(Holder(functools.partial(Said, train=True)), False)
    assert made.parts.keywords == {"train": False}
    dropout = nn.Dropout(0.5, deterministic=False)
    assert in_mode(dropout, False) is dropout


class Inner(eqx.Module):
    drop: eqx.nn.Dropout
    inference: bool
    training: bool = eqx.field(static=True)


def test_fields_of_equinox_modules_are_switched_also_static_and_nested_ones():
    module = [Inner(eqx.nn.Dropout(0.5), False, True), 3]
    found = equinox_in_mode(module, False)[0]
    assert (found.inference, found.drop.inference, found.training) == (True, True, False)
    assert (module[0].inference, module[0].drop.inference, module[0].training) == (
        False,
        False,
        True,
    )
    assert equinox_in_mode(module, True)[0] is module[0]


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.in_training = False

    def __call__(self, x):
        return self.drop(x, deterministic=not self.in_training)


class Counting(nnx.Module):
    def __init__(self, rngs):
        self.head, self.calls = nnx.Linear(3, 1, rngs=rngs), 0

    def __call__(self, x):
        self.calls += 1
        return self.head(x)


class Deaf(nnx.Module):
    def __init__(self, rngs):
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.drop(x, deterministic=True), use_running_average=True)


def applied(model: Any, train: bool, **kwargs: Any) -> Any:
    """Calls a model in a loss, for which it is looked at."""
    model = as_model(model)
    variables = model.init(KEY, X)
    state = TrainState.create(**variables._asdict(), apply_fn=model.apply_fn, rng=KEY)
    params = jax.tree.map(jnp.copy, state.params)
    return Context(state, train=train).apply(params, X, **kwargs)


def test_attributes_of_nnx_modules_are_switched():
    assert (applied(NnxNet, True) == 0).any()
    np.testing.assert_array_equal(applied(NnxNet, False), X)


class Phase(nn.Module):
    """Has its mode under a name that nobody knows."""

    @nn.compact
    def __call__(self, x, early=False):
        x = nn.BatchNorm(use_running_average=not early, name="norm")(x)
        return nn.Dropout(0.5, deterministic=not early, name="drop")(x)


class AlwaysOn(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False, name="drop")(x)


class AlwaysMoving(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False, name="norm")(x)


def test_model_that_is_always_in_evaluation_is_warned_about():
    with pytest.warns(ModeWarning) as caught:
        applied(Phase(), True)
    texts = sorted(str(each.message) for each in caught)
    assert "dropout is off in Phase" in texts[0]
    assert "'drop'" in texts[0]
    assert "running statistics do not change in Phase" in texts[1]
    assert "ctx.apply(params, x, my_flag=ctx.train)" in texts[0]
    with pytest.warns(ModeWarning) as caught:
        applied(Deaf, True)
    assert len(caught) == 2
    applied(Phase(), True, early=True)
    applied(Phase(), False)


def test_model_whose_dropout_is_always_on_is_warned_about():
    with pytest.warns(ModeWarning) as caught:
        applied(AlwaysOn(), False)
    (warning,) = caught
    assert "In evaluation, dropout is on in AlwaysOn: in 'drop'" in str(warning.message)
    applied(AlwaysOn(), True)  # a warning would be an error


@pytest.mark.parametrize(
    "module", [AlwaysMoving(), nn.BatchNorm(use_running_average=False)], ids=["inside", "alone"]
)
def test_statistics_that_move_in_evaluation_are_an_error(module):
    with pytest.raises(ConfigError, match="use_running_average=not train"):
        applied(module, False)
    applied(module, True)


def test_python_number_that_a_pass_of_nnx_changes_is_warned_about():
    with pytest.warns(ModeWarning) as caught:
        applied(Counting, True)
    (warning,) = caught
    assert re.search(r"changes 'calls' of Counting.*nnx\.Variable", str(warning.message))


class Regularized(nn.Module):
    @nn.compact
    def __call__(self, x, is_train):
        if is_train:
            x = x + 1
        return nn.Dropout(0.5)(x, deterministic=not self.has_rng("dropout"))


@pytest.mark.parametrize("lifted", [nn.remat, nn.jit])
def test_flag_reaches_a_lifted_module_by_position(lifted):
    model = lifted(Regularized, static_argnums=(2,))()
    np.testing.assert_array_equal(applied(model, False), X)
    assert (applied(model, True) == 0).any()


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x, mask=None, train=False):
        return x + 1 if train else x


def test_flag_behind_an_optional_argument_reaches_a_lifted_module():
    model = nn.remat(Masked, static_argnums=(3,))()
    np.testing.assert_array_equal(applied(model, True), X + 1)
    np.testing.assert_array_equal(applied(model, False), X)

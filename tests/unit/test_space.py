"""What a space may hold, and how it is checked against a config."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distaff.core.config.encoding import override
from distaff.errors import ConfigError
from distaff.optim import OptimizerConfig
from distaff.tune import Choice, Float, Int
from distaff.tune.space import check_space, contains, space_to_json, values_of

ADAMW = OptimizerConfig("adamw", options={"b1": 0.9})


@dataclasses.dataclass(frozen=True)
class Config:
    optimizer: OptimizerConfig = ADAMW
    width: int = 8
    activation: str = "relu"
    dropout: float | None = None


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Float(1, 0), "low <= high"),
        (lambda: Float(0, math.inf), "finite"),
        (lambda: Float(math.nan, 1), "finite"),
        (lambda: Float("0", 1), "numbers"),
        (lambda: Float(False, 1), "numbers"),
        (lambda: Float(0, 1, log=True), "low > 0"),
        (lambda: Int(0.5, 2), "whole"),
        (lambda: Int(2.0, 4), "whole"),
        (lambda: Int(0, 8, log=True), "low > 0"),
        (lambda: Choice(), "different"),
        (lambda: Choice("a", "a"), "different"),
        (lambda: Choice(True, 1), "different"),
        (lambda: Choice([1], [2]), "strings, finite numbers"),
        (lambda: Choice(1.0, math.nan), "finite"),
    ],
)
def test_dimension_refuses_what_cannot_be_searched(make, complaint):
    with pytest.raises(ConfigError, match=complaint):
        make()


def test_log_is_named():
    with pytest.raises(TypeError):
        Float(1e-4, 1e-2, True)


@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9), st.floats(-2e9, 2e9))
def test_float_contains_what_lies_between_its_ends(one, other, value):
    low, high = sorted((one, other))
    dimension = Float(low, high)
    assert dimension.ends() == (low, high)
    assert contains(dimension, value) == (low <= value <= high)


@pytest.mark.parametrize(
    ("dimension", "value", "expected"),
    [
        (Int(2, 4), 3, True),
        (Int(2, 4), 3.0, False),
        (Int(0, 4), True, False),
        (Int(2, 4), 5, False),
        (Float(0, 1), 1, True),
        (Float(0, 1), None, False),
        (Choice("a", None), None, True),
        (Choice("a", None), "b", False),
        (Choice(1.5, 2), 2, True),
    ],
)
def test_contains_goes_by_kind_and_value(dimension, value, expected):
    assert contains(dimension, value) == expected


def test_space_reaches_into_dataclasses_and_mappings():
    space = {
        "optimizer.learning_rate": Float(1e-4, 1e-1, log=True),
        "optimizer.name": Choice("adamw", "lamb"),
        "optimizer.options.b1": Float(0.8, 0.99),
        "optimizer.clip_norm": Choice(None, 1.0),
        "width": Int(4, 64, log=True),
        "dropout": Choice(None, 0.5),
    }
    check_space(Config(), space)
    own = values_of(Config(), space)
    assert own == {
        "optimizer.learning_rate": 1e-3,
        "optimizer.name": "adamw",
        "optimizer.options.b1": 0.9,
        "optimizer.clip_norm": None,
        "width": 8,
        "dropout": None,
    }
    changed = {path: dimension.ends()[-1] for path, dimension in space.items()}
    assert values_of(override(Config(), changed), space) == changed


@pytest.mark.parametrize(
    ("space", "complaint"),
    [
        ({}, "needs a space"),
        ({"optimizer.learning_rat": Float(0, 1)}, r"Did you mean 'learning_rate'\?"),
        ({"optimiser.learning_rate": Float(0, 1)}, r"Did you mean 'optimizer'\?"),
        ({"optimizer.options.b2": Float(0.9, 0.99)}, r"'optimizer.options.b2' does not.*'b1'"),
        ({"width.x": Int(1, 2)}, "must end at a value"),
        ({"width": (1, 2)}, r"to Float, Int or Choice.*\(1, 2\)"),
        ({"optimizer.learning_rate": Float(-1, 1)}, "learning_rate must be.* -1"),
        ({"optimizer.end_fraction": Float(0, 2)}, "end_fraction must be at most 1"),
        ({"optimizer.clip_norm": Float(0, 1)}, "clip_norm must be a finite int or float > 0"),
        ({"optimizer.name": Choice("adamw", "adamx")}, "'adamx'"),
        ({"width": Float(1, 8)}, "width must be int"),
        ({"activation": Choice("relu", 3)}, "activation must be str"),
    ],
)
def test_space_is_checked_against_the_config(space, complaint):
    with pytest.raises(ConfigError, match=complaint):
        check_space(Config(), space)


def test_space_as_json_tells_spaces_apart():
    spaces = [
        {"width": Int(1, 4)},
        {"width": Int(1, 4, log=True)},
        {"width": Int(1, 5)},
        {"width": Float(1, 4)},
        {"width": Choice(1, 4)},
        {"depth": Int(1, 4)},
    ]
    written = [space_to_json(space) for space in spaces]
    assert written[0] == {"width": {"kind": "Int", "low": 1, "high": 4, "log": False}}
    assert all(one != other for i, one in enumerate(written) for other in written[:i])
    both = {"a": Int(1, 2), "b": Choice("x")}
    assert space_to_json(both) == space_to_json(dict(reversed(both.items())))

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
from distaff.tune.space import (
    check_space,
    contains,
    drawn,
    in_order,
    own_values,
    restored,
    space_to_json,
    stored,
    values_of,
)

ADAMW = OptimizerConfig("adamw", options={"b1": 0.9})


@dataclasses.dataclass(frozen=True)
class Config:
    optimizer: OptimizerConfig = ADAMW
    width: int = 8
    activation: str = "relu"
    dropout: float | None = None
    units: int = 4


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
        (lambda: Choice((1, [2])), "tuples of these"),
        (lambda: Float("a b", 1), "paths of other options"),
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


def test_conditions_bounds_and_tuples_decide_what_a_trial_has():
    space = {
        "units": Int(1, "width"),
        "optimizer.options.b1": Float(
            0.8, 0.99, when={"optimizer.name": "adamw", "width": [8, 16]}
        ),
        "width": Choice(8, 16, 32),
        "optimizer.name": Choice("adamw", "sgd"),
        "widths": Choice((4,), (8, 8)),
    }

    def draw(**taken):
        seen = {}

        def suggest(path, dimension):
            seen[path] = dimension
            return taken.get(path.rpartition(".")[2], dimension.ends()[-1])

        return drawn(space, suggest), seen

    values, seen = draw(name="adamw", width=16)
    assert seen["units"] == Int(1, 16)
    assert values["optimizer.options.b1"] == 0.99
    assert restored(space, stored(values)) == values
    assert stored(values)["widths"] == "(8, 8)"
    for other in ({"name": "sgd", "width": 16}, {"name": "adamw", "width": 32}):
        assert "optimizer.options.b1" not in draw(**other)[0]
    assert in_order(space).index("width") < in_order(space).index("units")


def test_own_values_are_those_that_the_config_s_conditions_allow():
    space = {
        "optimizer.name": Choice("adamw", "sgd"),
        "width": Int(4, 16, when={"optimizer.name": "adamw"}),
        "dropout": Choice(0.5, when={"optimizer.name": "sgd"}),
    }
    assert own_values(Config(), space) == {"optimizer.name": "adamw", "width": 8}
    assert own_values(Config(width=32), space) is None


LAMB = {"optimizer.name": "lamb"}


@pytest.mark.parametrize(
    ("space", "complaint"),
    [
        ({"width": Int(1, 2, when=LAMB)}, "'width' depends on 'optimizer.name', which is not in"),
        ({"width": Int(1, "widht")}, "depends on 'widht'"),
        (
            {"width": Int(1, 2, when={"activation": "a"}), "activation": Choice("b", "c")},
            "only if 'activation' is 'a', which it never is",
        ),
        (
            {"width": Int(4, 8, when={"dropout": 0.5}), "dropout": Choice(0.5, when={"width": 4})},
            "in a circle",
        ),
        (
            {
                "optimizer.name": Choice("adamw", "lamb"),
                "width": Int(4, 8, when=LAMB),
                "activation": Choice("a", when={"width": 4, "optimizer.name": "adamw"}),
            },
            "'activation' is never searched",
        ),
        ({"width": Int(16, "units"), "units": Int(8, 32)}, "must not cross.* 16 .* 8"),
        ({"width": Int(1, "activation"), "activation": Choice("a")}, "values must be numbers"),
        (
            {
                "optimizer.name": Choice("adamw", "lamb"),
                "units": Int(4, 8, when=LAMB),
                "width": Int(1, "units"),
            },
            "not searched in all of its trials",
        ),
    ],
)
def test_conditions_and_bounds_are_checked(space, complaint):
    with pytest.raises(ConfigError, match=complaint):
        check_space(Config(), space)

"""Config: the round trip through JSON text, what is only recorded, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.core.config import encoding, strict_json
from distaff.errors import ConfigError


class Color(Enum):
    RED = 1
    BLUE = "blue"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    name: Literal["adam", "adamw"] = "adam"
    learning_rate: float = 1e-3
    clip: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    boundaries: Mapping[int, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int
    optimizer: Optimizer = Optimizer()
    plan: Schedule | Optimizer | None = None
    shape: tuple[int, int] = (8, 8)
    widths: tuple[int, ...] = ()
    names: list[str] = dataclasses.field(default_factory=list)
    rates: Sequence[float] = ()
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)
    anything: Any = None
    length: float | int | str = 0
    level: Literal[1, 2] = 1
    shuffle: bool = False
    root: Path = Path("runs")
    color: Color = Color.RED
    derived: int = dataclasses.field(default=0, init=False)


@dataclasses.dataclass(frozen=True)
class Named:
    optimizer: Optimizer | str | None = None


@dataclasses.dataclass(frozen=True)
class Unreadable:
    activation: Callable[..., Any] = nn.relu


floats = st.floats(allow_nan=False)
names = st.one_of(st.text(max_size=5), st.sampled_from(["$value", "$$", "$"]))
optimizers = st.builds(
    Optimizer,
    name=st.sampled_from(["adam", "adamw"]),
    learning_rate=floats,
    clip=st.none() | floats,
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | names,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(names, inner, max_size=3)
        | st.dictionaries(st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)
configs = st.builds(
    Config,
    num_classes=st.integers(),
    optimizer=optimizers,
    plan=st.none()
    | optimizers
    | st.builds(Schedule, boundaries=st.dictionaries(st.integers(), floats, max_size=3)),
    shape=st.tuples(st.integers(), st.integers()),
    widths=st.lists(st.integers(), max_size=3).map(tuple),
    names=st.lists(names, max_size=3),
    rates=st.lists(floats, max_size=3).map(tuple),
    scales=st.dictionaries(names, floats, max_size=3),
    anything=plain,
    length=st.integers() | floats | names,
    shuffle=st.booleans(),
    root=st.sampled_from([Path("runs"), Path("/a/b c")]),
    color=st.sampled_from(Color),
)


def through_text(value: Any) -> Any:
    return json.loads(strict_json.dumps(encoding.to_json(value)))


@settings(deadline=None)
@given(configs)
def test_config_survives_the_round_trip_through_text(original):
    restored = encoding.from_json(Config, through_text(original))
    assert restored == original
    assert repr(restored) == repr(original)
    assert encoding.diff(original, restored) == {}


def test_nan_survives_the_round_trip_in_strict_json():
    text = strict_json.dumps(
        encoding.to_json(Optimizer(learning_rate=float("nan"), clip=float("-inf")))
    )
    assert "NaN" not in text
    assert "Infinity" not in text
    restored = encoding.from_json(Optimizer, json.loads(text))
    assert restored.learning_rate != restored.learning_rate
    assert restored.clip == float("-inf")


def test_dumps_keeps_the_order_and_refuses_bare_nan():
    assert strict_json.dumps({"b": 1, "a": [2]}) == '{\n  "b": 1,\n  "a": [\n    2\n  ]\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        strict_json.dumps({"loss": float("nan")})


class Tower(nn.Module):
    width: int = 8
    activation: Callable[..., Any] = nn.relu
    dtype: Any = jnp.bfloat16
    block: nn.Module | None = None

    def method(self):
        return None


@pytest.mark.parametrize(
    ("value", "recorded"),
    [
        (jnp.bfloat16, {"$dtype": "bfloat16"}),
        (np.float32, {"$dtype": "float32"}),
        (np.dtype("int8"), {"$dtype": "int8"}),
        (np.zeros((3, 4), np.float32), {"$array": {"shape": [3, 4], "dtype": "float32"}}),
        (jax.random.key(0), {"$array": {"shape": [], "dtype": "key<fry>"}}),
        (np.float32(0.5), 0.5),
        (jnp.bfloat16(1.5), 1.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (jnp.float32(np.inf), {"$float": "inf"}),
        (np.longdouble(1), {"$repr": "np.longdouble('1.0')"}),
        (json.dumps, {"$function": "json:dumps"}),
        (jnp.tanh, {"$function": "jax.numpy:tanh"}),
        (Optimizer, {"$type": f"{__name__}:Optimizer"}),
        ({1: "a"}, {"$items": [[1, "a"]]}),
        (1 + 2j, {"$repr": "(1+2j)"}),
        (object(), {"$repr": "<object object>"}),
    ],
)
def test_to_json_records_hyperparameters_of_any_kind(value, recorded):
    actual = encoding.to_json(value)
    assert actual == recorded
    assert type(actual) is type(recorded)
    assert encoding.to_json(json.loads(strict_json.dumps(actual))) == recorded


def test_to_json_records_a_linen_module_by_class_and_fields():
    recorded = encoding.to_json(Tower(block=nn.Dense(3)))
    assert list(recorded) == ["$class", "width", "activation", "dtype", "block"]
    assert recorded["$class"] == f"{__name__}:Tower"
    assert recorded["activation"]["$function"].endswith(":relu")
    assert recorded["block"]["$class"] == "flax.linen.linear:Dense"
    assert recorded["block"]["features"] == 3


def test_to_json_is_the_same_in_every_process():
    assert "0x" not in str(encoding.to_json({"make": partial(Tower().method)}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"num_clases": 3}, "'num_clases' does not. Did you mean 'num_classes'?"),
        ({"optimizer": {"learning_rat": 1}}, "Did you mean 'learning_rate'?"),
        ({"plan": {"boundaris": {}}}, "plan must be"),
        ({"optimizer": {"learning_rate": "1e-3"}}, "optimizer.learning_rate must be float"),
        ({"optimizer": {"learning_rate": True}}, "True (bool)"),
        ({"optimizer": {"clip": []}}, "optimizer.clip must be float | None"),
        ({"optimizer": {"name": "sgd"}}, "optimizer.name must be"),
        ({"optimizer": 3}, "optimizer must be Optimizer, but the data hold 3"),
        ({"num_classes": 3.0}, "num_classes must be int"),
        ({"shape": [8]}, "shape must be tuple[int, int]"),
        ({"widths": [1, "2"]}, "widths[1] must be int"),
        ({"names": "abc"}, "names must be list[str]"),
        ({"scales": {"a": None}}, "scales.a must be float"),
        ({"color": "GREEN"}, "color must be Color"),
        ({"level": True}, "level must be"),
        ({"color": {}}, "color must be Color"),
        ({"anything": {"$dtype": "int8"}}, "Pass the object that this describes"),
        ({"derived": 1}, "'derived' does not"),
    ],
)
def test_from_json_refuses_with_the_path_and_the_value(data, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        encoding.from_json(Config, {"num_classes": 10, **data})


def test_from_json_needs_every_field_without_a_default():
    with pytest.raises(ConfigError, match="num_classes has no default"):
        encoding.from_json(Config, {"shuffle": True})
    with pytest.raises(ConfigError, match="The config must be Config"):
        encoding.from_json(Config, [])


def test_from_json_names_the_path_in_a_union_with_one_dataclass():
    with pytest.raises(ConfigError, match=re.escape("'optimizer.nam' does not. Did you mean")):
        encoding.from_json(Named, {"optimizer": {"nam": "adam"}})
    assert encoding.from_json(Named, {"optimizer": "adam"}).optimizer == "adam"


def test_from_json_imports_nothing_that_the_data_name():
    data = {"activation": {"$function": "flax.linen:relu"}}
    with pytest.raises(ConfigError, match="activation must be"):
        encoding.from_json(Unreadable, data)


def test_override_replaces_nested_values_and_leaves_the_original():
    original = Config(num_classes=10, scales={"a": 1.0})
    changes = {
        "optimizer.learning_rate": np.float64(2),
        "optimizer.clip": 1,
        "scales.a": 3.0,
        "root": "elsewhere",
        "names": ["x"],
    }
    changed = encoding.override(original, changes)
    assert changed.optimizer == Optimizer(learning_rate=2.0, clip=1.0)
    assert type(changed.optimizer.learning_rate) is float
    assert (changed.scales, changed.root, changed.names) == ({"a": 3.0}, Path("elsewhere"), ["x"])
    assert original == Config(num_classes=10, scales={"a": 1.0})


def test_override_validates_all_changes_together():
    @dataclasses.dataclass(frozen=True)
    class Span:
        start: int = 0
        end: int = 1

        def __post_init__(self):
            assert self.start < self.end

    assert encoding.override(Span(), {"start": 5, "end": 6}) == Span(5, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.learning_rat": 1.0}, "'optimizer.learning_rat' does not. Did you mean"),
        ({"optimiser.learning_rate": 1.0}, "Did you mean 'optimizer'?"),
        ({"num_classes.x": 1}, "'num_classes' is 10"),
        ({"num_classes": "ten"}, "num_classes must be int"),
        ({"scales.b": 1.0}, "'scales.b' does not"),
    ],
)
def test_override_refuses_unknown_paths_and_wrong_types(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        encoding.override(Config(num_classes=10, scales={"a": 1.0}), changes)


@settings(deadline=None)
@given(optimizers, optimizers)
def test_diff_is_what_override_needs(old, new):
    changes = {path: after for path, (_, after) in encoding.diff(old, new).items()}
    if any(isinstance(after, dict) for after in changes.values()):  # inf, tagged
        changes = {path: getattr(new, path) for path in changes}
    assert encoding.override(old, changes) == new


def test_diff_names_what_changed_on_configs_and_on_json():
    old = Config(num_classes=10, scales={"a": 1.0}, anything=Tower(), shuffle=True)
    new = dataclasses.replace(
        old, optimizer=Optimizer(clip=2.0), scales={"b": 1.0}, anything=Tower(activation=nn.gelu)
    )
    difference = encoding.diff(encoding.to_json(old), new)
    assert list(difference) == ["optimizer.clip", "scales.a", "scales.b", "anything.activation"]
    assert difference["optimizer.clip"] == (None, 2.0)
    assert difference["scales.a"] == (1.0, dataclasses.MISSING)
    assert difference["scales.b"] == (dataclasses.MISSING, 1.0)
    assert encoding.diff({"shuffle": True}, {"shuffle": 1}) == {"shuffle": (True, 1)}

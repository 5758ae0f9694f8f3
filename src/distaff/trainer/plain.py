"""Records the arguments of a constructor as strict JSON, and restores them.

Unlike the encoding of options, which describes a run, values are restored exactly: tuples,
dataclasses, enum members, small arrays, Linen modules, and functions of modules, by the names of
objects that this process has imported. Everything else is `{"$missing": "..."}`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.config.encoding import to_json
from distaff.core.names import imported, name_of
from distaff.models import rebuild

_MOST_NUMBERS = 4096
_DTYPES = (np.dtype, type(jnp.float32))


class LostError(ValueError):
    """A value was recorded only as a description, or its name is not imported."""


def recorded(value: Any) -> Any:
    """Returns a value as strict JSON, for `restored`."""
    match value:
        case Enum():
            return _named("$enum", type(value), value.name)
        case None | bool() | str():
            return value
        case PurePath():
            return {"$path": str(value)}
        case int() | float() if type(value) in (int, float):
            return value if math.isfinite(value) else {"$float": str(value)}
        case list():
            return [recorded(each) for each in value]
        case tuple() if type(value) is tuple:
            return {"$tuple": [recorded(each) for each in value]}
        case dict():
            return _mapping(value)
        case np.ndarray() | np.generic() | jax.Array():
            return _array(value)
        case nn.Module():
            return {"$module": to_json(value)}
        case _ if isinstance(value, _DTYPES):
            return {"$dtype": np.dtype(value).name}
        case type():
            return _named("$type", value)
        case _ if dataclasses.is_dataclass(value):
            fields = [each.name for each in dataclasses.fields(value) if each.init]
            return _named(
                "$dataclass", type(value), {n: recorded(getattr(value, n)) for n in fields}
            )
        case _ if callable(value) and hasattr(value, "__qualname__"):
            return _named("$function", value)
    return _missing(value)


def restored(data: Any) -> Any:
    """Returns the value that `recorded` encoded.

    Raises:
        LostError: it was recorded only as a description, or its name is not imported.
    """
    if isinstance(data, list):
        return [restored(each) for each in data]
    if not isinstance(data, Mapping):
        return data
    tag = next((name for name in data if name.startswith("$")), None)
    if tag is None:
        return {name: restored(each) for name, each in data.items()}
    if tag not in _READERS:
        raise LostError(f"it was recorded as {data[tag]!r}")
    return _READERS[tag](data)


def _named(tag: str, named: Any, content: Any = None) -> Any:
    """Records an object by its name, if that can be imported; else as a description."""
    module = getattr(named, "__module__", None)
    if not isinstance(module, str) or imported(name_of(named)) is not named:
        return _missing(named)
    return {tag: name_of(named)} if content is None else {tag: name_of(named), "content": content}


def _missing(value: Any) -> dict[str, str]:
    name = getattr(value, "__qualname__", None)
    # Not the repr, which may hold an address and would make runs differ.
    return {"$missing": str(name) if name else f"an object of the class {type(value).__name__}"}


def _mapping(value: Mapping[Any, Any]) -> Any:
    if any(type(key) is not str or key.startswith("$") for key in value):
        return {"$items": [[recorded(key), recorded(each)] for key, each in value.items()]}
    return {key: recorded(each) for key, each in value.items()}


def _array(value: Any) -> Any:
    if value.size > _MOST_NUMBERS or value.dtype.kind not in "biuf":
        return _missing(value)
    kind = "jax" if isinstance(value, jax.Array) else "numpy"
    kind = "scalar" if isinstance(value, np.generic) else kind
    return {
        "$array": kind,
        "dtype": value.dtype.name,
        "values": recorded(np.asarray(value).tolist()),
    }


def _read_array(data: Mapping[str, Any]) -> Any:
    array = np.asarray(restored(data["values"]), data["dtype"])
    if data["$array"] == "jax":
        return jnp.asarray(array)
    return array[()] if data["$array"] == "scalar" else array


def _found(data: Mapping[str, Any], tag: str) -> Any:
    found = imported(str(data[tag]))
    if found is None:
        raise LostError(f"it was recorded as {data[tag]!r}, which is not imported")
    return found


def _read_dataclass(data: Mapping[str, Any]) -> Any:
    cls = _found(data, "$dataclass")
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise LostError(f"{data['$dataclass']!r} is no longer a dataclass")
    return cls(**{name: restored(each) for name, each in data["content"].items()})


def _read_enum(data: Mapping[str, Any]) -> Any:
    cls = _found(data, "$enum")
    members = getattr(cls, "__members__", {})
    if data["content"] not in members:
        raise LostError(f"{data['$enum']!r} no longer has a member {data['content']!r}")
    return members[data["content"]]


_READERS = {
    "$float": lambda data: float(data["$float"]),
    "$path": lambda data: Path(data["$path"]),
    "$tuple": lambda data: tuple(restored(each) for each in data["$tuple"]),
    "$items": lambda data: {restored(key): restored(each) for key, each in data["$items"]},
    "$dtype": lambda data: jnp.dtype(data["$dtype"]),
    "$array": _read_array,
    "$module": lambda data: rebuild(data["$module"]),
    "$dataclass": _read_dataclass,
    "$enum": _read_enum,
    "$type": lambda data: _found(data, "$type"),
    "$function": lambda data: _found(data, "$function"),
}

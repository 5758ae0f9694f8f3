"""Converts configs to strict JSON and back, and changes and compares them by dotted paths.

Numbers, strings, lists and mappings are written as they are. Any other value becomes a dict with
one of these reserved tags as a key:

    {"$float": "nan"}                                  a float that JSON lacks: nan, inf, -inf
    {"$items": [[1, "a"], [2, "b"]]}                   a mapping whose keys are not strings
    {"$dtype": "bfloat16"}                             a dtype
    {"$array": {"shape": [3, 4], "dtype": "float32"}}  an array
    {"$function": "optax:adam"}                        a function: `module:qualified name`
    {"$type": "flax.linen.linear:Dense"}               a class
    {"$class": "models:CNN", "width": 8}               a Linen module: its class and fields
    {"$repr": "..."}                                   any other object

The first two are read back. The others only record what a run used: reading never imports a name
from a file. Strict JSON is left unchanged, so encoding twice equals encoding once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.names import name_of
from distaff.errors import ConfigError, nearest

Value = TypeVar("Value")

_SEQUENCES = {tuple: tuple, list: list, Sequence: tuple}
_MAPPINGS = (dict, Mapping)
_SCALARS = (bool, int, float, str, type(None))
_TAGS = {"$float", "$items", "$dtype", "$array", "$function", "$type", "$class", "$repr"}
_DTYPES = (np.dtype, type(jnp.float32))  # jnp's dtypes are classes with their own metaclass


def to_json(value: Any) -> Any:
    """Returns a value as strict JSON, encoded as the module's docstring lists.

    A dataclass is written as the fields of its constructor, a path as a string, an enum member as
    its name, a 0-d array as a number.
    """
    match value:
        case Enum():
            return value.name
        case None | bool():
            return value
        case str() | PurePath():
            return str(value)
        case int():
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else {"$float": str(float(value))}
        case Mapping():
            return _mapping_to_json(value)
        case list() | tuple():
            return [to_json(element) for element in value]
        case type():
            return _describe(value)
        case nn.Module():
            return {"$class": name_of(type(value)), **_mapping_to_json(_members(value))}
        case _ if dataclasses.is_dataclass(value):
            return _mapping_to_json(_members(value))
    return _describe(value)


def _mapping_to_json(mapping: Mapping[Any, Any]) -> dict[str, Any]:
    if any(type(key) is not str for key in mapping):
        return {"$items": [[to_json(key), to_json(mapping[key])] for key in mapping]}
    return {key: to_json(member) for key, member in mapping.items()}


def _members(instance: Any) -> dict[str, Any]:
    skipped = ("parent", "name") if isinstance(instance, nn.Module) else ()  # Linen's own fields
    fields = [field.name for field in dataclasses.fields(instance) if field.init]
    return {name: getattr(instance, name) for name in fields if name not in skipped}


def _describe(value: Any) -> Any:
    is_class = isinstance(value, type)
    if isinstance(value, _DTYPES) or (is_class and issubclass(value, np.generic)):
        return {"$dtype": np.dtype(value).name}
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        if value.ndim or not isinstance(value.dtype, np.dtype):  # a JAX key's dtype is not NumPy's
            return {"$array": {"shape": list(value.shape), "dtype": str(value.dtype)}}
        number = value.item()
        return to_json(number) if isinstance(number, _SCALARS) else {"$repr": repr(value)}
    if is_class:
        return {"$type": name_of(value)}
    if callable(value) and hasattr(value, "__qualname__"):
        return {"$function": name_of(value)}
    # A memory address would make the same config differ from run to run.
    return {"$repr": re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))}


def from_json(cls: type[Value], data: Any) -> Value:
    """Rebuilds a dataclass from the output of `to_json`, by the types of its fields.

    Supported field types: bool, int, float, str, None, Path, Enum, Literal, tuple, list, Mapping,
    dataclasses, unions of these, and Any. A union prefers the member of exactly the data's type,
    then the first that accepts the data. Missing fields have their defaults.

    Raises:
        ConfigError: a key is unknown, a value is missing or of another type, or the data only
            describe an object (a function, a dtype, an array).
    """
    return _read(cls, data, "")


def _read(kind: Any, data: Any, path: str) -> Any:
    if isinstance(data, Mapping) and data.get("$float") in ("nan", "inf", "-inf"):
        data = float(data["$float"])
    origin = typing.get_origin(kind) or kind
    if origin in (Any, object):
        origin = type(data)
    if origin in (typing.Union, types.UnionType):
        return _read_union(kind, data, path)
    if dataclasses.is_dataclass(origin) and isinstance(data, Mapping):
        return _read_fields(origin, data, path)
    if origin in _SEQUENCES and isinstance(data, list):
        return _read_sequence(kind, _SEQUENCES[origin], data, path)
    if origin in _MAPPINGS and isinstance(data, Mapping):
        return _read_mapping(kind, data, path)
    if (origin, type(data)) in ((float, int), (Path, str)):
        return origin(data)
    if isinstance(origin, type) and issubclass(origin, Enum) and data in list(origin.__members__):
        return origin[str(data)]
    choices = typing.get_args(kind) if origin is typing.Literal else ()
    if any(type(data) is type(choice) and data == choice for choice in choices):
        return data
    if type(data) is origin and isinstance(data, _SCALARS):
        return data
    raise _mismatch(kind, data, path)


def _mismatch(kind: Any, data: Any, path: str) -> ConfigError:
    name = kind.__name__ if isinstance(kind, type) else str(kind)
    remedy = "Pass the object that this describes." if _is_tagged(data) else "Correct the value."
    return ConfigError(
        f"{path or 'The config'} must be {name}, but the data hold {data!r} "
        f"({type(data).__name__}). {remedy}"
    )


def _is_tagged(data: Any) -> bool:
    return isinstance(data, Mapping) and not _TAGS.isdisjoint(data)


def _read_union(kind: Any, data: Any, path: str) -> Any:
    members = typing.get_args(kind)
    if type(data) in members:
        return _read(type(data), data, path)
    members = [member for member in members if _has_keys(member) == isinstance(data, Mapping)]
    if len(members) == 1:
        return _read(members[0], data, path)
    for member in members:
        with contextlib.suppress(ConfigError):
            return _read(member, data, path)
    raise _mismatch(kind, data, path)


def _has_keys(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or (typing.get_origin(kind) or kind) in _MAPPINGS


def _read_fields(cls: Any, data: Mapping[str, Any], path: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    kinds = typing.get_type_hints(cls)
    for name in data:
        _check_known(name, fields, path)
    for name, field in fields.items():
        required = field.default is field.default_factory  # both are MISSING
        if required and name not in data:
            raise ConfigError(
                f"{_join(path, name)} has no default, so the data must give it; they give "
                f"{sorted(data)}. Add {name!r}."
            )
    return cls(**{name: _read(kinds[name], data[name], _join(path, name)) for name in data})


def _read_sequence(kind: Any, build: Any, data: list[Any], path: str) -> Any:
    members = typing.get_args(kind) or (Any, ...)
    if build is list or len(members) == 1 or members[-1] is ...:
        members = members[:1] * len(data)
    if len(members) != len(data):
        raise _mismatch(kind, data, path)
    pairs = zip(members, data, strict=True)
    return build(_read(*pair, f"{path}[{index}]") for index, pair in enumerate(pairs))


def _read_mapping(kind: Any, data: Mapping[str, Any], path: str) -> dict[Any, Any]:
    key_kind, value_kind = typing.get_args(kind) or (Any, Any)
    if data.keys() == {"$items"}:
        items = data["$items"]
    elif _is_tagged(data):
        raise _mismatch(kind, data, path)
    else:
        items = data.items()
    return {
        _read(key_kind, key, path): _read(value_kind, value, _join(path, str(key)))
        for key, value in items
    }


def _check_known(name: str, known: Iterable[str], path: str) -> None:
    if name not in known:
        raise ConfigError(
            f"An option must exist; {_join(path, name)!r} does not. {nearest(name, known)}"
        )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def override(config: Value, changes: Mapping[str, Any]) -> Value:
    """Returns a copy of a config with some values replaced.

    Args:
        config: a dataclass whose fields may be dataclasses and mappings.
        changes: new values by dotted path: `{"optimizer.learning_rate": 1e-3}`. A number, string,
            boolean or None must be of the field's type; other objects are not checked.

    Raises:
        ConfigError: a path is unknown, or a value is not of the field's type.
    """
    return _override(config, changes, "")


def _override(config: Any, changes: Mapping[str, Any], path: str) -> Any:
    is_mapping = isinstance(config, Mapping)
    if not is_mapping and not dataclasses.is_dataclass(config):
        raise ConfigError(
            f"A dotted path must end at a value; {path!r} is {config!r}, which holds no options, "
            f"so {sorted(changes)} cannot be set in it. Override {path!r} itself."
        )
    members = dict(config) if is_mapping else _members(config)
    kinds = {} if is_mapping else typing.get_type_hints(type(config))
    nested: dict[str, dict[str, Any]] = {}
    for dotted, value in changes.items():
        name, _, rest = dotted.partition(".")
        _check_known(name, members, path)
        if rest:
            nested.setdefault(name, {})[rest] = value
        elif isinstance(value, (*_SCALARS, np.generic)):
            members[name] = _read(kinds.get(name, Any), to_json(value), _join(path, name))
        else:
            members[name] = value
    for name, parts in nested.items():
        members[name] = _override(members[name], parts, _join(path, name))
    return members if is_mapping else dataclasses.replace(config, **members)


def diff(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Returns the differences between two configs, each a config or the output of `to_json`.

    Returns:
        The old and the new JSON value by dotted path, in the order of the fields. A value missing
        on one side is `dataclasses.MISSING`.
    """
    return dict(_differences(to_json(old), to_json(new), ""))


def _differences(old: Any, new: Any, path: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if _is_branch(old) and _is_branch(new):
        for name in {**old, **new}:
            parts = (side.get(name, dataclasses.MISSING) for side in (old, new))
            yield from _differences(*parts, _join(path, name))
    elif old != new or isinstance(old, bool) != isinstance(new, bool):
        yield path, (old, new)


def _is_branch(data: Any) -> bool:
    return isinstance(data, dict) and not (len(data) == 1 and _is_tagged(data))

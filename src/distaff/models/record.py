"""Rebuilds a module from its recorded description, without importing anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from distaff.core.config.encoding import to_json
from distaff.core.names import chosen, imported, name_of
from distaff.errors import CheckpointError

_LINENS_OWN = ("parent", "name")
_REMEDY = "Pass the module itself: load_from_checkpoint(path, model=...)."


def rebuild(record: Any, cls: Any = None) -> nn.Module:
    """Rebuilds a Linen module from a record of `distaff.core.config.encoding.to_json`.

    A hyperparameter that JSON cannot hold, such as a function, is taken from the class's default
    if that is what was recorded.

    Args:
        record: `{"$class": "package.module:Name", ...hyperparameters}`.
        cls: a Linen class; by default the one of the recorded name among the module classes that
            this process has imported.

    Raises:
        CheckpointError: the class is not imported, or a hyperparameter cannot be rebuilt.
    """
    record = record if isinstance(record, Mapping) else {}
    if "$module" in record:
        raise CheckpointError(
            "Only Flax Linen modules can be rebuilt from a record; this model is of the kind "
            f"{record.get('kind')}: {record['$module']}. {_REMEDY}"
        )
    cls = cls or _imported(str(record.get("$class")))
    name = name_of(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    arguments = {}
    for field_name, recorded in record.items():
        if field_name == "$class":
            continue
        if field_name not in fields or field_name in _LINENS_OWN:
            raise CheckpointError(f"{name} has no hyperparameter {field_name!r}. {_REMEDY}")
        if not _is_default(recorded, fields[field_name].default, field_name):
            arguments[field_name] = _value(recorded, f"{name}.{field_name}")
    try:
        return cls(**arguments)
    except Exception as error:
        raise CheckpointError(
            f"{name} cannot be created from its record, {arguments}: {error}. {_REMEDY}"
        ) from error


def is_linen_class(model: Any) -> bool:
    """Returns whether a model is given as a Linen class, which `rebuild` can instantiate."""
    return isinstance(model, type) and issubclass(model, nn.Module)


def _imported(name: str) -> Any:
    cls = chosen(name, _subclasses(nn.Module))
    if cls is None:
        raise CheckpointError(
            f"The model was recorded as {name!r}, but no module class of that name is imported. "
            f"Import it first; for a command, name its file, such as --code train.py. {_REMEDY}"
        )
    return cls


def _is_default(recorded: Any, default: Any, field_name: str) -> bool:
    if default is dataclasses.MISSING or to_json(default) != recorded:
        return False
    # Anonymous functions look the same in a record. Initializers may differ, since the parameters
    # are loaded.
    nameless = "<lambda>" in str(recorded) or "<locals>" in str(recorded)
    return field_name.endswith("_init") or not nameless


def _value(recorded: Any, name: str) -> Any:
    if isinstance(recorded, list):
        return tuple(_value(item, name) for item in recorded)
    if not isinstance(recorded, Mapping):
        return recorded
    if "$class" in recorded:
        return rebuild(recorded)
    if set(recorded) == {"$function"}:
        function = imported(str(recorded["$function"]))
        if function is not None:
            return function
    try:
        match dict(recorded):
            case {"$dtype": dtype}:
                return jnp.dtype(dtype)
            case {"$float": text}:
                return float(text)
    except (TypeError, ValueError):
        pass
    if any(key.startswith("$") for key in recorded):
        raise CheckpointError(
            f"{name} was recorded as {recorded}, which cannot be rebuilt. {_REMEDY}"
        )
    return {key: _value(item, name) for key, item in recorded.items()}


def _subclasses(cls: type[nn.Module]) -> Iterator[type[nn.Module]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)

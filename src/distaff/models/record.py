"""From a recorded description of a model back to the module, without importing anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from distaff.config import to_json
from distaff.errors import CheckpointError


def rebuild(record: Any) -> nn.Module:
    """Rebuilds a Linen module from what `distaff.config.to_json` recorded of it.

    Its class is looked for among the module classes that this process has imported already.
    A hyperparameter that JSON cannot hold, such as a function, is taken from the class's default
    if that is what was recorded.

    Args:
        record: `{"$class": "package.module:Name", ...hyperparameters}`.

    Raises:
        CheckpointError: the class is not imported, or a hyperparameter cannot be rebuilt.
    """
    name = str(record.get("$class")) if isinstance(record, Mapping) else "None"
    remedy = "Pass the module itself: load_from_checkpoint(path, model=...)."
    known: dict[str, Any] = {
        f"{cls.__module__}:{cls.__qualname__}": cls for cls in _subclasses(nn.Module)
    }
    if name not in known:
        raise CheckpointError(
            f"The model was recorded as {name!r}, and no module class of that name is imported. "
            f"Import it first. {remedy}"
        )
    fields = {field.name: field for field in dataclasses.fields(known[name])}
    arguments = {}
    for field_name, recorded in record.items():
        if field_name == "$class":
            continue
        if field_name not in fields:
            raise CheckpointError(f"{name} has no hyperparameter {field_name!r} any more. {remedy}")
        default = fields[field_name].default
        if default is not dataclasses.MISSING and to_json(default) == recorded:
            continue
        arguments[field_name] = _value(recorded, f"{name}.{field_name}", remedy)
    return known[name](**arguments)


def _value(recorded: Any, name: str, remedy: str) -> Any:
    if isinstance(recorded, list):
        return tuple(_value(item, name, remedy) for item in recorded)
    if not isinstance(recorded, Mapping):
        return recorded
    if "$class" in recorded:
        return rebuild(recorded)
    if set(recorded) == {"$dtype"}:
        return jnp.dtype(recorded["$dtype"])
    if any(key.startswith("$") for key in recorded):
        raise CheckpointError(
            f"{name} was recorded as {recorded}, which cannot be rebuilt. {remedy}"
        )
    return {key: _value(item, name, remedy) for key, item in recorded.items()}


def _subclasses(cls: type[nn.Module]) -> Iterator[type[nn.Module]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)

"""Frozen dataclasses registered as pytrees."""

from __future__ import annotations

import dataclasses
from typing import Any, dataclass_transform

import jax


def static(**kwargs: Any) -> Any:
    """Declares a static field: part of the program instead of an array of the state.

    It must be hashable. Changing it compiles the step again.
    """
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(static, dataclasses.field)
)
class FrozenPyTree:
    """Makes each subclass a frozen keyword-only dataclass, registered as a pytree."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclass: Any = dataclasses.dataclass(frozen=True, kw_only=True, repr=False)(cls)
        fields = dataclasses.fields(dataclass)
        jax.tree_util.register_dataclass(
            cls,
            data_fields=[f.name for f in fields if not f.metadata.get("static", False)],
            meta_fields=[f.name for f in fields if f.metadata.get("static", False)],
        )

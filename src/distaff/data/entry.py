"""Finds entries of batches by name, and registers dataclasses of batches as pytrees."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from distaff.core.typing import Batch
from distaff.errors import BatchError

INPUT_NAMES = ("image", "images", "x", "input", "inputs", "tokens", "features")
"""Names of the model's input in a batch, in order of preference."""


def entry(batch: Batch, names: Sequence[str], position: int, *, what: str, override: str) -> Any:
    """Returns the entry of a batch with one of these names, or at this position.

    Args:
        batch: a dict or dataclass with named entries, or a tuple or list.
        names: names of the entry, in order of preference.
        position: index of the entry in a tuple or list.
        what: description of the entry for the error, such as `"The model's input"`.
        override: method to override for other batches, for the error.

    Raises:
        BatchError: the batch has no such entry; the message lists its entries.
    """
    if isinstance(batch, tuple | list) and not hasattr(batch, "_fields"):
        if position < len(batch):
            return batch[position]
        held = f"{len(batch)} items"
    else:
        entries = named(batch)
        for name in names:
            if name in entries:
                return entries[name]
        held = str(sorted(entries)) if entries else _unnamed(batch)
    raise BatchError(
        f"{what} must be in the batch under one of the names {list(names)}, or at position "
        f"{position} of a tuple; this batch holds {held}. Override {override} to return it."
    )


def _unnamed(batch: Batch) -> str:
    """Returns what to call a batch whose entries have no names."""
    if not hasattr(batch, "shape"):
        return type(batch).__name__
    return f"one array of shape {batch.shape}. Pass (inputs, labels), if this is whole arrays"


def named(batch: Batch) -> Mapping[str, Any]:
    """Returns the entries of a batch by name; empty if they have no names."""
    if isinstance(batch, Mapping):
        return batch
    if hasattr(batch, "_asdict"):
        return batch._asdict()
    if dataclasses.is_dataclass(batch):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {}


def register_dataclasses(tree: Any) -> Any:
    """Registers the plain dataclasses in a tree as pytrees, once per process, and returns the tree.

    Raises:
        BatchError: JAX cannot register the class.
    """
    while (plain := _first_dataclass(tree)) is not None:
        try:
            jax.tree_util.register_dataclass(plain)
        except (TypeError, ValueError) as error:
            raise BatchError(
                f"A batch must be a pytree; the dataclass {plain.__name__} could not be "
                f"registered: {error}. Decorate the class with @jax.tree_util.register_dataclass, "
                "or yield dicts."
            ) from error
    return tree


def _first_dataclass(tree: Any) -> type | None:
    """Returns the class of the first leaf that is an unregistered dataclass, or None."""
    for leaf in jax.tree.leaves(tree):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            return None if hasattr(leaf, "shape") else type(leaf)
    return None

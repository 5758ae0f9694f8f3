"""Plain dataclasses as batches: JAX is told of their fields when the first one is seen."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from distaff.errors import BatchError


def known_to_jax(tree: Any) -> Any:
    """Returns a tree, after JAX knows the fields of the plain dataclasses in it.

    A class is registered once in a process, as `jax.tree_util.register_dataclass` does it; a loss
    function then gets its batches as objects of that class.

    Raises:
        BatchError: JAX does not take the class.
    """
    while (plain := _plain(tree)) is not None:
        try:
            jax.tree_util.register_dataclass(plain)
        except (TypeError, ValueError) as error:
            raise BatchError(
                f"JAX must know the fields of a batch; those of {plain.__name__} could not be "
                f"registered: {error}. Decorate the class with @jax.tree_util.register_dataclass, "
                "or yield dicts."
            ) from error
    return tree


def _plain(tree: Any) -> type | None:
    """Returns the class of the first leaf that is a dataclass; None without one."""
    for leaf in jax.tree.leaves(tree):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            return None if hasattr(leaf, "shape") else type(leaf)
    return None

"""Compares the arrays of a checkpoint with the arrays of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from distaff.core.typing import PyTree
from distaff.errors import leaf_name


def leaf_forms(tree: PyTree) -> dict[str, str]:
    """Returns dtype and shape of every leaf by path, as `{"Dense_0/kernel": "float32[64, 10]"}`.

    A typed random key counts as the integers that it is stored as.

    Args:
        tree: a tree of arrays, `jax.ShapeDtypeStruct` or stored leaf metadata.
    """
    return {leaf_name(path): _form(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def first_difference(stored: Mapping[str, str], expected: Mapping[str, str]) -> str | None:
    """Returns a sentence on the first leaf that differs between checkpoint and model, or None."""
    for name, form in expected.items():
        if name not in stored:
            return f"The leaf {name!r} ({form} in the model) is missing in the checkpoint."
        if stored[name] != form:
            return f"The leaf {name!r} is {stored[name]} in the checkpoint, {form} in the model."
    for name, form in stored.items():
        if name not in expected:
            return f"The leaf {name!r} ({form} in the checkpoint) is unexpected: not in the model."
    return None


def _form(leaf: Any) -> str:
    if not hasattr(leaf, "dtype"):
        return type(leaf).__name__
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return f"{leaf.dtype}{list(leaf.shape)}"

"""Names for the types that recur in signatures: aliases, of no effect at run time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax

PyTree: TypeAlias = Any
"""Any nesting of dicts, tuples, lists and registered dataclasses, with arrays at the leaves."""

Params: TypeAlias = Any
"""A pytree of the arrays that the optimizer changes."""

Batch: TypeAlias = Any
"""A pytree of arrays that all have the same leading axis: `[batch, ...]`."""

Key: TypeAlias = jax.Array
"""A typed JAX random key, shape `[]`, as `jax.random.key(seed)` makes it."""

Scalars: TypeAlias = Mapping[str, float]
"""Computed metrics by name, such as `{"val/loss": 0.31}`."""

Values: TypeAlias = Mapping[str, Any]
"""Computed metrics by name: floats, or float64 arrays for those that are not one number."""

Schedule: TypeAlias = Callable[[Any], Any]
"""A function of the optimizer step (an int) that gives a learning rate."""

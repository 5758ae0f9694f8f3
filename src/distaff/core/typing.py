"""Type aliases used in signatures, without effect at run time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax

PyTree: TypeAlias = Any
"""Any nesting of dicts, tuples, lists and registered dataclasses, with arrays at the leaves."""

Params: TypeAlias = Any
"""A pytree of the arrays that the optimizer updates."""

Batch: TypeAlias = Any
"""A pytree of arrays that all have the same leading axis: `[batch, ...]`."""

Key: TypeAlias = jax.Array
"""A typed JAX random key, shape `[]`, such as `jax.random.key(seed)`."""

Scalars: TypeAlias = Mapping[str, float]
"""Computed metrics by name, such as `{"val/loss": 0.31}`."""

Values: TypeAlias = Mapping[str, Any]
"""Computed metrics by name: floats, or float64 arrays for non-scalar metrics."""

Schedule: TypeAlias = Callable[[Any], Any]
"""A function from the optimizer step (int) to a learning rate."""

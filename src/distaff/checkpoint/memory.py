"""Checkpoints in host memory, for runs that write no files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.checkpoint.protocol import Store
from distaff.checkpoint.retention import best_steps, named_best
from distaff.core.typing import PyTree
from distaff.errors import CheckpointError
from distaff.execution.shards import HostParts, copied_parts


class MemoryStore(Store):
    """Keeps the newest checkpoint of a run and those that it names as best, in memory only.

    If the newest is provisional (`info["provisional"]`), the one before it is kept too.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[dict[str, PyTree], dict[str, Any]]] = {}

    def save(self, step: int, tree: Mapping[str, PyTree], info: Mapping[str, Any]) -> None:
        """Copies the arrays to the host; saving a step again replaces its `info` only."""
        arrays = self._kept[step][0] if step in self._kept else jax.tree.map(_to_host, dict(tree))
        self._kept[step] = (arrays, json.loads(json.dumps(info)))
        lasting = [n for n, (_, facts) in self._kept.items() if not facts.get("provisional")]
        wanted = (step, max(lasting, default=step), *best_steps(info))
        self._kept = {kept: value for kept, value in self._kept.items() if kept in wanted}

    def steps(self) -> tuple[int, ...]:
        return tuple(sorted(self._kept))

    def best(self) -> int | None:
        return next(iter(named_best(self)[1]), None)

    def info(self, step: int) -> dict[str, Any]:
        return self._entry(step)[1]

    def load(self, step: int, abstract: Mapping[str, PyTree]) -> dict[str, PyTree]:
        arrays = self._entry(step)[0]
        return {name: jax.tree.map(_restore, arrays[name]) for name in abstract}

    def _entry(self, step: int) -> tuple[dict[str, PyTree], dict[str, Any]]:
        if step not in self._kept:
            raise CheckpointError(
                f"There is no checkpoint of step {step} in memory. Known steps: "
                f"{list(self.steps())}."
            )
        return self._kept[step]


def _to_host(leaf: Any) -> Any:
    is_here = getattr(leaf, "is_fully_addressable", True)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf.copy() if is_here else copied_parts(leaf)
    return np.array(leaf) if is_here else HostParts.of(leaf)


def _restore(leaf: Any) -> jax.Array:
    if isinstance(leaf, HostParts):
        return leaf.restored()
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return copied_parts(leaf)
    # Copied, because the next step donates the returned arrays.
    return leaf.copy() if isinstance(leaf, jax.Array) else jnp.array(leaf)

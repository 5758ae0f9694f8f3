"""The rungs of the fit ladder: options that make a step need less memory, the cheapest first."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from distaff.core.typing import Params
from distaff.errors import leaf_name


class Rung(NamedTuple):
    """Values of options as JSON; None keeps the value of the trainer.

    Attributes:
        remat: what is computed again.
        micro_batch: examples per micro-batch.
    """

    remat: str | list[str] | None = None
    micro_batch: int | None = None

    @property
    def changes(self) -> dict[str, Any]:
        """The options that it changes, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.changes.items())


AS_WRITTEN = Rung()


def remat_rungs(params: Params) -> Iterator[Rung]:
    """Yields rungs of rematerialization: products stored, then only the inputs of the blocks.

    Args:
        params: the parameters, or their shapes, from whose paths the blocks are known.
    """
    yield Rung("dots_saveable")
    patterns = block_patterns(params)
    if patterns:
        yield Rung(patterns[0] if len(patterns) == 1 else patterns)
    else:
        yield Rung("nothing_saveable")


def micro_batches(size: int, num_parts: int) -> Iterator[int]:
    """Yields sizes of micro-batches; from one to the next, there are at least twice as many.

    >>> list(micro_batches(24, 1))
    [12, 6, 3, 1]

    Args:
        size: examples in a batch of all devices.
        num_parts: devices that split a batch.
    """
    each, last = size // num_parts, 1
    for count in range(2, each + 1):
        if not each % count and (count >= 2 * last or count == each):
            last = count
            yield size // count


def block_patterns(params: Params) -> list[str]:
    """Returns patterns for the blocks of a model: modules of modules whose names are numbered.

    Without any, those whose arrays are all stacked along their first axis, as `nn.scan` makes them.

    >>> block = {"up": {"kernel": np.ones((2, 2))}}
    >>> block_patterns({"Block_0": block, "Block_1": block, "head": {"kernel": np.ones((2, 2))}})
    ['Block_*']
    """
    leaves = jax.tree.leaves_with_path(params)
    shapes = {tuple(leaf_name(path).split("/")): np.shape(leaf) for path, leaf in leaves}
    parents = {path[:n] for path in shapes for n in range(1, len(path) - 1)}
    for depth in sorted({len(path) for path in parents}):
        members: dict[str, int] = {}
        for path in parents:
            stem = path[-1].rstrip(string.digits)
            if len(path) == depth and stem != path[-1]:
                pattern = "/".join((*path[:-1], f"{stem}*"))
                members[pattern] = members.get(pattern, 0) + 1
        if found := sorted(pattern for pattern, number in members.items() if number > 1):
            return found
    return sorted(
        "/".join(path) for path in parents if len(path) == 1 and _is_stacked(path, shapes)
    )


def _is_stacked(path: tuple[str, ...], shapes: Mapping[tuple[str, ...], tuple[int, ...]]) -> bool:
    inside = [shape for each, shape in shapes.items() if each[: len(path)] == path]
    lengths = {shape[:1] for shape in inside}
    return len(lengths) == 1 and lengths != {(1,)} and min(map(len, inside)) > 1

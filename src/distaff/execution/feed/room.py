"""Room: where the chunks of an epoch end, and what their batches contain."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from distaff.core.config.cadence import Count, Every, Unit
from distaff.core.typing import Batch
from distaff.errors import BatchError, ConfigError, leaf_name

COUNTED: tuple[Unit, ...] = ("examples", "tokens")
"""The units that are counted in each batch, if a run uses them."""


class Room:
    """Ends the chunks of an epoch at the steps, examples and tokens at which something is due.

    Args:
        cadences: when something is due; other units are ignored.
        step: completed steps before the first chunk.
        counts: the counts before the first chunk, by unit.
        count_tokens: returns the tokens of a batch; required for a cadence of tokens.

    Attributes:
        counts: the counts after the last chunk, by unit; of the units of `cadences` only.
    """

    def __init__(
        self,
        cadences: Sequence[Every] = (),
        step: int = 0,
        counts: Mapping[Unit, Count] | None = None,
        count_tokens: Callable[[Batch], Any] | None = None,
    ) -> None:
        self._steps = [each for each in cadences if each.unit == "steps"]
        self._counted = [each for each in cadences if each.unit in COUNTED]
        self._step, self._count_tokens = step, count_tokens
        before = counts or {}
        self.counts = {each.unit: before.get(each.unit, Count(0, 0)) for each in self._counted}

    def num_steps(self, num_done: int) -> int:
        """Returns the most steps of a chunk, at least 1, after so many steps of this epoch."""
        step = self._step + num_done
        return min((every.left(step) for every in self._steps), default=sys.maxsize)

    def take(self, batches: Iterable[tuple[int, Callable[[], Batch]]]) -> int | None:
        """Counts the first batches, up to one at which something is due.

        Args:
            batches: the examples of each batch, and a function that returns the batch.

        Returns:
            The number of batches that were counted; None if nothing needs to be counted.

        Raises:
            BatchError: the tokens of a batch cannot be counted.
        """
        if not self._counted:
            return None
        number = 0
        for examples, batch in batches:
            number += 1
            for unit, count in self.counts.items():
                more = examples if unit == "examples" else tokens_of(batch(), self._count_tokens)
                self.counts[unit] = Count(count.now, count.now + more)
            if any(every.is_passed(self.counts[every.unit]) for every in self._counted):
                break
        return number


def tokens_of(batch: Batch, count_tokens: Callable[[Batch], Any] | None) -> int:
    """Returns the number of tokens of a batch on the host.

    Raises:
        ConfigError: there is no function that counts them.
        BatchError: the batch is on a device, or its number of tokens is not an integer of at
            least 0.
    """
    if count_tokens is None:
        raise no_tokens()
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if isinstance(leaf, jax.Array):
            raise BatchError(
                f"Tokens are counted on the host, before a step; {leaf_name(path)!r} is a JAX "
                "array, which may be on a device. Yield NumPy arrays from the loader, or use steps "
                "or examples instead of tokens."
            )
    count = np.asarray(count_tokens(batch))
    if count.ndim or count.dtype.kind not in "iu" or count < 0:
        raise BatchError(
            "count_tokens must return the number of tokens of a batch, an integer of at least 0; "
            f"got {count!r}. Write, for example, int(np.count_nonzero(mask))."
        )
    return int(count)


def no_tokens() -> ConfigError:
    """Returns the error for a cadence in tokens, if a trainer does not count them."""
    return ConfigError(
        "This trainer does not say how many tokens a batch has, so nothing can be done every "
        "n tokens, nor end after n tokens. Define count_tokens(self, batch) in its class, which "
        "returns an integer computed with NumPy; or use steps or examples."
    )

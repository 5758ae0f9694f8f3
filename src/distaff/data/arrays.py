"""ArrayLoader: yields batches of arrays in memory, in a reproducible order."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

import jax
import numpy as np

from distaff.core.config.checks import whole
from distaff.core.digest import digest, sample_digest
from distaff.core.typing import Batch, PyTree
from distaff.core.views import html
from distaff.core.views.brief import arrays_table, brief, spec
from distaff.data.loader import canonicalize, drops_remainder, epoch_length, num_examples
from distaff.errors import BatchError


class ArrayLoader:
    """A loader over arrays in memory.

    Every `iter()` is one epoch. Its order is a function of `(seed, epoch)` alone. Breaking out of a
    loop abandons the rest of that epoch: the next `iter()` begins a new one at its first batch.
    Only `set_state` makes the next `iter()` begin in the middle. `get_state` and `set_state` take
    the same time at any position.

    64-bit numbers are stored in 32 bits, as JAX would (see `jax_enable_x64`).

    Args:
        arrays: a pytree of arrays `[examples, ...]`.
        batch_size: examples in a batch.
        shuffle: whether each epoch has a new order.
        seed: seed of the orders, not negative.
        remainder: what to do with a short last batch: `"keep"` yields it at its own size, `"drop"`
            omits it. Default: drop it when shuffling, since each epoch then omits other examples,
            and keep it otherwise, since an evaluation counts every example.

    Raises:
        BatchError: the arrays differ in length, hold no examples, or hold less than one batch and
            short batches are dropped; or an integer does not fit into 32 bits.
        ConfigError: an option is not an integer, or out of range.

    >>> loader = ArrayLoader({"x": np.arange(5.0)}, batch_size=2)
    >>> [batch["x"].tolist() for batch in loader]
    [[0.0, 1.0], [2.0, 3.0], [4.0]]
    """

    has_one_order = True

    def __init__(
        self,
        arrays: PyTree,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        remainder: Literal["keep", "drop"] | None = None,
    ) -> None:
        self.batch_size = whole("batch_size", batch_size)
        self.num_examples = num_examples(arrays)
        self._shuffle = shuffle
        self._seed = whole("seed", seed, least=0)
        self._drop = drops_remainder(remainder, shuffle)
        epoch_length(self.num_examples, self.batch_size, drop=self._drop)
        self._arrays = canonicalize(arrays)
        self._position = (0, 0)
        self._start = (0, 0)

    def __repr__(self) -> str:
        batches = f"{len(self)} batches of {self.batch_size}"
        order = "shuffled" if self._shuffle else ""
        return brief(self, f"{self.num_examples:,} examples", batches, order, spec(self._arrays))

    def _repr_html_(self) -> str:
        return html.details(repr(self), arrays_table(self._arrays))

    @property
    def arrays(self) -> PyTree:
        """The arrays `[examples, ...]` of the batches; do not modify them."""
        return self._arrays

    @property
    def shuffle(self) -> bool:
        """Whether each epoch has a new order."""
        return self._shuffle

    def __len__(self) -> int:
        return epoch_length(self.num_examples, self.batch_size, drop=self._drop)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.gathered, self.rows())

    def rows(self) -> Iterator[np.ndarray]:
        """Yields the rows of `arrays` in each batch of the next epoch, int32 `[batch]`.

        Use it instead of `iter()` to gather the batches elsewhere.
        """
        epoch, start = self._start
        self._start = (epoch + 1, 0)
        order = self._order(epoch)
        for batch in range(start, len(self)):
            self._position = (epoch, batch + 1)
            yield self._rows_of(order, batch)
        self._position = self._start = (epoch + 1, 0)

    def num_left(self) -> int:
        """Returns how many batches are left of this epoch; all of the next one at its end."""
        return len(self) - self._start[1] or len(self)

    def skip_epoch(self) -> None:
        """Moves to the end of the epoch of which `num_left` counts the batches."""
        epoch, start = self._start
        self._position = self._start = (epoch + 1 + (start == len(self)), 0)

    def abandon(self) -> None:
        """Moves to the next epoch, if `set_state` restored a position within one."""
        epoch, start = self._start
        if start:
            self._position = self._start = (epoch + 1, 0)

    def peek(self) -> Batch:
        """Returns the next batch of the next or resumed epoch, without consuming it."""
        epoch, batch = self._start
        if batch == len(self):
            epoch, batch = epoch + 1, 0
        return self.gathered(self._rows_of(self._order(epoch), batch))

    def in_order(self) -> Self:
        """Returns a loader of the same arrays that neither shuffles nor drops batches."""
        view = copy.copy(self)
        view._shuffle, view._drop = False, False
        view._position = view._start = (0, 0)
        return view

    def get_state(self) -> dict[str, int]:
        """Returns the position after the last yielded batch, and the options of its order."""
        epoch, batch = self._position
        return {"epoch": epoch, "batch": batch, **self._identity()}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Restores a position; the next `iter()` yields the rest of that epoch.

        Args:
            state: the result of `get_state` of a loader with the same arguments.

        Raises:
            BatchError: the state was saved by a loader with other data or options.
        """
        identity = self._identity()
        saved = {name: state.get(name) for name in identity}
        if saved != identity or not {"epoch", "batch"} <= set(state):
            raise BatchError(
                "A position can only be restored in a loader with the same options and data; "
                f"saved: {dict(state)}, this loader: {identity}. Make the loader with the saved "
                "options and data, or start a new run."
            )
        epoch, batch = int(state["epoch"]), int(state["batch"])
        if epoch < 0 or not 0 <= batch <= len(self):
            raise BatchError(
                f"An epoch of this loader has {len(self)} batches; the saved position is "
                f"epoch={epoch}, batch={batch}. Pass a state that get_state returned."
            )
        self._position = self._start = (epoch, batch)

    def identity(self) -> dict[str, Any]:
        """Returns the options, and a digest of the arrays; arrays above 4 MiB are sampled."""
        values = digest(*map(sample_digest, jax.tree.leaves(self._arrays)))
        return {**self._identity(), "values": values}

    def _identity(self) -> dict[str, int]:
        return {
            "num_examples": self.num_examples,
            "batch_size": self.batch_size,
            "shuffle": int(self._shuffle),
            "seed": self._seed,
            "drop": int(self._drop),
        }

    def _order(self, epoch: int) -> np.ndarray:
        if self._shuffle:
            order = np.random.default_rng([self._seed, epoch]).permutation(self.num_examples)
            return order.astype(np.int32)
        return np.arange(self.num_examples, dtype=np.int32)

    def _rows_of(self, order: np.ndarray, batch: int) -> np.ndarray:
        return order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def gathered(self, rows: np.ndarray) -> Batch:
        """Returns the batch with these rows of `arrays`."""
        return jax.tree.map(lambda array: array[rows], self._arrays)

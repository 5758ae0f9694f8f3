"""Contract tests for loaders."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from itertools import islice
from typing import Any

import jax
import numpy as np

from distaff.core.typing import Batch
from distaff.data import Loader, first_batch, num_batches, num_examples


class LoaderContract(ABC):
    """Tests for a loader: subclass it in a pytest file and define `make_loader`.

    class TestMyLoader(LoaderContract):
        def make_loader(self):
            return MyLoader(...)
    """

    @abstractmethod
    def make_loader(self) -> Loader:
        """Returns a new loader at its start, always the same, with 3 to 20 batches per epoch."""

    def test_loader_follows_the_protocol(self) -> None:
        """A loader is iterable, and has `get_state` and `set_state`."""
        assert isinstance(self.make_loader(), Loader)

    def test_epochs_have_one_number_of_batches(self) -> None:
        """Every epoch has the same number of batches, which `len` returns if it is defined."""
        loader = self.make_loader()
        counts = [len(list(loader)) for _ in range(3)]
        assert counts[0] >= 3, f"the contract needs at least 3 batches, got {counts[0]}"
        assert len(set(counts)) == 1, f"epochs of different lengths: {counts}"
        assert num_batches(loader) in (None, counts[0])

    def test_batches_have_one_leading_length(self) -> None:
        """All leaves of a batch have the same leading axis, which is not empty."""
        assert all(num_examples(batch) > 0 for batch in self.make_loader())

    def test_new_loaders_yield_equal_batches(self) -> None:
        """The order depends on the constructor arguments only."""
        assert_batches_equal(_epochs(self.make_loader(), 2), _epochs(self.make_loader(), 2))

    def test_state_is_json(self) -> None:
        """The state is equal after a round trip through JSON."""
        loader = self.make_loader()
        for _ in loader:
            state = loader.get_state()
            assert json.loads(json.dumps(state, allow_nan=False)) == state

    def test_state_resumes_exactly_at_every_position(self) -> None:
        """The rest of the epoch and all later epochs are as in an uninterrupted run."""
        length = len(list(self.make_loader()))
        for epoch in range(2):
            for position in range(length + 1):
                loader = self.make_loader()
                _epochs(loader, epoch)
                running = iter(loader)
                list(islice(running, position))
                state = json.loads(json.dumps(loader.get_state()))
                resumed = self.make_loader()
                resumed.set_state(state)
                assert resumed.get_state() == state
                assert_batches_equal(list(resumed), list(running))
                assert_batches_equal(_epochs(resumed, 2), _epochs(loader, 2))

    def test_state_set_to_where_it_is_continues(self) -> None:
        """`set_state(get_state())` continues the current epoch."""
        loader, whole = self.make_loader(), list(self.make_loader())
        start = list(islice(loader, 2))
        loader.set_state(loader.get_state())
        assert_batches_equal(start + list(loader), whole)

    def test_break_abandons_the_epoch(self) -> None:
        """After a `break`, the next loop yields a whole epoch."""
        loader = self.make_loader()
        length = len(list(loader))
        next(iter(loader))
        assert len(list(loader)) == length
        loader.set_state(loader.get_state())
        next(iter(loader))
        assert len(list(loader)) == length

    def test_first_batch_is_not_consumed(self) -> None:
        """Reading the first batch changes neither the state nor the batches that follow."""
        loader = self.make_loader()
        state = loader.get_state()
        assert_batches_equal(first_batch(loader), next(iter(self.make_loader())))
        assert loader.get_state() == state
        assert_batches_equal(_epochs(loader, 2), _epochs(self.make_loader(), 2))

    def test_batches_are_fresh_arrays(self) -> None:
        """A batch keeps its values and its memory while later ones are created."""
        loader = self.make_loader()
        kept, copies = [], []
        for batch in _epochs(loader, 2):
            kept.append(batch)
            copies.append(jax.tree.map(np.array, batch))
        assert_batches_equal(kept, copies)
        leaves = [leaf for leaf in jax.tree.leaves(kept) if isinstance(leaf, np.ndarray)]
        for position, leaf in enumerate(leaves):
            for other in leaves[:position]:
                assert not np.shares_memory(leaf, other), "two batches share one buffer"


def assert_batches_equal(actual: Any, expected: Any) -> None:
    """Raises AssertionError, with the difference, if two pytrees of arrays are not equal."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def _epochs(loader: Loader, count: int) -> list[Batch]:
    return [batch for _ in range(count) for batch in loader]

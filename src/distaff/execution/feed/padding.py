"""Padding: which batches may be filled up with more rows, and to which size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from distaff.core.typing import Batch, PyTree
from distaff.data import num_examples
from distaff.errors import MaskError
from distaff.execution.execution import Execution
from distaff.execution.feed.chunk import ChunkData
from distaff.step.independence import keeps_apart

MayPad = Callable[[ChunkData], bool]
"""Whether batches like those of a source may be padded."""


class Padding:
    """Finds out which batches may be padded: those whose examples a function keeps apart.

    Padding repeats the last example. A function whose outputs for one example depend on others,
    such as a contrastive loss, would see the copies, and so would one that uses the size of the
    batch. This is read from the function's jaxpr, once for each form of its arguments.

    Args:
        execution: how the function is traced; what is not traced is not padded for.
        function: `(state, batch) -> outputs`, each `[batch, ...]`. It raises MaskError where there
            are others.
    """

    def __init__(self, execution: Execution, function: Callable[[Any, Batch], PyTree]) -> None:
        self._execution, self._function = execution, function
        self._known: dict[Any, bool] = {}

    def of(self, state: PyTree) -> MayPad:
        """Returns whether batches may be padded that are used with a state."""
        form = _form(state)

        def may_pad(source: ChunkData) -> bool:
            key = form, type(source), _form(source)
            if key not in self._known:
                self._known[key] = self._found(state, source)
            return self._known[key]

        return may_pad

    def _found(self, state: PyTree, source: ChunkData) -> bool:
        batch = jax.eval_shape(lambda each: each.batch(0), source)
        if not has_rows(batch):
            return False

        def trace(state: PyTree, batch: Batch) -> Any:
            return self._execution.jaxpr(self._function, state, batch)

        try:
            return keeps_apart(trace, state, batch)
        except MaskError:
            return False


def has_rows(batch: Batch) -> bool:
    """Returns whether each array of a batch has one row for each example."""
    return {leaf.shape[:1] for leaf in jax.tree.leaves(batch)} == {(num_examples(batch),)}


class Full(NamedTuple):
    """The largest batch so far, of those whose examples have its shapes.

    Attributes:
        size: how many examples it has.
        may_pad: whether smaller ones may be padded to that.
    """

    size: int
    may_pad: bool


class Sizes:
    """The sizes of the batches of one pass over a data set; see `Full`."""

    def __init__(self, may_pad: MayPad) -> None:
        self._may_pad = may_pad
        self._full: dict[Any, Full] = {}

    def full(self, form: Any, size: int, source: Callable[[], ChunkData]) -> Full:
        """Returns what a batch is padded to: the largest one so far, which it may be itself.

        Args:
            form: what its examples have in common with others.
            size: how many examples it has.
            source: where it is found.
        """
        full = self._full.get(form)
        if full is None or full.size < size:
            full = self._full[form] = Full(size, self._may_pad(source()))
        return full


def form_of_examples(tree: PyTree, *, axes: int = 1) -> Any:
    """Returns what batches have in common that differ in their size alone.

    Args:
        tree: arrays.
        axes: how many leading axes are not those of an example.
    """
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((leaf.shape[axes:], leaf.dtype) for leaf in leaves)


def _form(tree: PyTree) -> Any:
    return form_of_examples(tree, axes=0)

"""Finds the largest batch whose training step fits into the memory of the device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from distaff.core.config.checks import whole
from distaff.core.typing import Batch
from distaff.core.views.amounts import byte_text
from distaff.core.views.brief import brief
from distaff.data import counts_itself, first_to_train, num_batches, num_examples
from distaff.data.loader import canonicalize_leaf
from distaff.errors import BatchError, ConfigError
from distaff.execution.device_memory import free_bytes, is_out_of_memory, program_bytes
from distaff.execution.feed.feed import resident_bytes
from distaff.execution.placement import num_devices
from distaff.trainer.module import TrainerModule
from distaff.trainer.trials import step_of_run, training_batches

_SHARE = 0.9
"""Share of the free memory that a step may need; batches are read ahead into the rest."""

_MOST_UNKNOWN = 2**16
_DIGITS = 4
_NUM_STEPS = 1000
_REMEDY = "Use a smaller model, remat, or precision='bf16'."


class TriedBatch(NamedTuple):
    """A batch size that was compiled.

    Attributes:
        batch_size: number of examples.
        needed_bytes: memory of its training step, as the compiler says; None if the compiler ran
            out of memory itself.
        fits: whether that is within the limit.
        ran: whether a step ran in memory; None if it was not tried.
    """

    batch_size: int
    needed_bytes: int | None
    fits: bool
    ran: bool | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSizeSearch:
    """The result of a search for the largest batch size.

    Attributes:
        batch_size: the largest batch size found.
        limit_bytes: the memory that a step may need.
        tried: the batch sizes that were compiled, in ascending order.
        remark: a limit of the search; empty without one.
    """

    batch_size: int
    limit_bytes: int
    tried: tuple[TriedBatch, ...]
    remark: str = ""

    @property
    def power_of_two(self) -> int:
        """The largest power of two that is not above `batch_size`."""
        return 1 << (self.batch_size.bit_length() - 1)

    def table(self) -> str:
        """Returns the batch sizes with their memory, as text."""
        lines = [("batch size", "memory", "fits", "ran")]
        for each in self.tried:
            ran = {None: "-", True: "yes", False: "out of memory"}[each.ran]
            size = "-" if each.needed_bytes is None else byte_text(each.needed_bytes)
            lines.append((f"{each.batch_size:,}", size, "yes" if each.fits else "no", ran))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in lines
        )

    def __repr__(self) -> str:
        by_size = {each.batch_size: each.needed_bytes for each in self.tried}
        needed = by_size[self.batch_size]
        memory = f"of {byte_text(self.limit_bytes)}"
        memory = memory if needed is None else f"{byte_text(needed)} {memory}"
        return brief(self, f"batch size {self.batch_size}", memory, self.remark)


def find_batch_size(
    trainer: TrainerModule,
    train_loader: Any,
    *,
    limit_bytes: int | None = None,
    most: int | None = None,
    attempt: bool = True,
) -> BatchSizeSearch:
    """Finds the largest batch whose training step fits into memory.

    The step is compiled for a few batch sizes. The compiler says how much memory each needs, and a
    line through two of them predicts the next. Sizes have at most four significant binary digits
    (16, 18, 20, ..., 32, 36, ...): the result is at most an eighth below the largest that fits.
    Then one step is run with it, on copies of the first examples. If that runs out of memory, the
    size is halved.

    A tenth of the free memory is left for batches that are read ahead, and on an accelerator also
    the bytes of arrays that a run keeps there. The state of a trainer that has one counts as taken.
    Steps that a run fuses into one program need a little more: their batches are in memory
    together.

    The trainer does not change: not its state, its files, its loggers, or the position of the
    loader.

    Args:
        trainer: a trainer that has not trained yet, or has.
        train_loader: a loader, any iterable of batches, or arrays such as `(x, y)`. Only its first
            batch is read.
        limit_bytes: the memory that a step may need; by default what is free on the device, or on
            the CPU in the host, less what is left for the data.
        most: the largest batch size to consider; by default the number of examples in an epoch, or
            65,536 if that is unknown.
        attempt: whether to run a step with the largest batch.

    Returns:
        The batch size, and a table of those that were compiled.

    Raises:
        ConfigError: an argument is invalid, not even one example fits, the backend does not report
            its memory, or the trainer has `debug=True` or trains on several devices.
        BatchError: the loader is empty, can be read only once, or yields batches of its own class.
    """
    if not isinstance(trainer, TrainerModule):
        raise ConfigError(
            f"find_batch_size takes a trainer, such as tasks.Classifier(model); got {trainer!r}."
        )
    if trainer.config.debug:
        raise ConfigError("find_batch_size compiles steps, and debug=True does not. Turn it off.")
    for name, value in (("limit_bytes", limit_bytes), ("most", most)):
        if value is not None:
            whole(name, value)
    with training_batches(trainer, train_loader) as loader:
        batch, length = first_to_train(loader), num_batches(loader)
    if counts_itself(batch):
        raise BatchError(
            f"A batch of type {type(batch).__name__} counts its examples itself, so that it is not "
            "known how to make a larger one. Try sizes with trainer.train_model and max_time."
        )
    if num_devices(batch) > 1 or trainer.config.mesh is not None:
        raise ConfigError(
            "find_batch_size supports one device only. Pass trainer.variant(mesh=None), with "
            "batches on one device; for data parallelism, multiply what it finds by the number of "
            "devices."
        )
    if most is None:
        most = _MOST_UNKNOWN if length is None else length * num_examples(batch)
    programs = _Programs(trainer, batch)
    limit = limit_bytes or programs.free_bytes(loader)
    programs.limit = limit
    found = _largest(programs.fits, programs.room, num_examples(batch), most)
    if not found:
        raise programs.too_large()
    if attempt:
        found = programs.ran(found)
    return BatchSizeSearch(
        batch_size=found,
        limit_bytes=limit,
        tried=tuple(programs.tried[size] for size in sorted(programs.tried)),
        remark="the largest one considered" if found == most else "",
    )


class _Programs:
    """Compiles the training step of a trainer for several batch sizes, and runs it.

    Attributes:
        limit: the memory that a step may need.
        tried: the batch sizes that were compiled.
    """

    limit = 0

    def __init__(self, trainer: TrainerModule, batch: Batch) -> None:
        self._trainer, self._batch = trainer, batch
        alone = step_of_run(trainer, batch, _NUM_STEPS)
        self._program = alone.execution.program(alone.step, donate=0)
        self._placement = alone.execution.placement
        self._state = jax.eval_shape(lambda state: state, alone.state)
        self._compiled: dict[int, Any] = {}
        self.tried: dict[int, TriedBatch] = {}

    def free_bytes(self, loader: Any) -> int:
        """Returns the memory that is free on the device, less what is left for the data."""
        kept = resident_bytes(loader, self._placement)
        return max(int(_SHARE * free_bytes()) - kept, 1)

    def fits(self, size: int) -> bool:
        """Compiles the step for a batch size; returns whether its memory is within the limit."""
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                (size, *leaf.shape[1:]), jax.dtypes.canonicalize_dtype(leaf.dtype)
            ),
            self._batch,
        )
        needed = None
        try:
            self._compiled = {size: self._program.lower(self._state, shapes).compile()}
            needed = program_bytes(self._compiled[size])
        except Exception as error:  # a compiler may run out of memory, too
            if not is_out_of_memory(error):
                raise
        fits = needed is not None and needed <= self.limit
        self.tried[size] = TriedBatch(size, needed, fits)
        return fits

    def room(self) -> list[tuple[int, int]]:
        """Returns the sizes compiled so far, in ascending order, with the bytes that they leave."""
        rows = sorted(self.tried.values())
        return [(x.batch_size, self.limit - x.needed_bytes) for x in rows if x.needed_bytes]

    def too_large(self) -> ConfigError:
        """Returns the error for a step that does not fit with one example."""
        (size, room), *_ = self.room() or [(1, 0)]
        needed = byte_text(self.limit - room) if room else "more memory than there is"
        return ConfigError(
            f"A training step with {size} example needs {needed}, and the limit is "
            f"{byte_text(self.limit)}. Raise limit_bytes. {_REMEDY}"
        )

    def ran(self, size: int) -> int:
        """Runs one step; returns the batch size, halved until a step runs.

        Raises:
            ConfigError: not even one example runs.
        """
        while not self._runs(size):
            if size == 1:
                raise ConfigError(f"A training step with one example ran out of memory. {_REMEDY}")
            size //= 2
        return size

    def _runs(self, size: int) -> bool:
        if size not in self._compiled:
            self.fits(size)
        rows = np.arange(size) % num_examples(self._batch)
        did = True
        try:
            leaves = jax.tree.leaves(step_of_run(self._trainer, self._batch, _NUM_STEPS).state)
            state = jax.tree.unflatten(jax.tree.structure(self._state), leaves)
            batch = jax.tree.map(
                lambda leaf: canonicalize_leaf(np.asarray(leaf)[rows]), self._batch
            )
            del leaves
            jax.block_until_ready(self._compiled[size](state, batch))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            did = False
        self.tried[size] = self.tried[size]._replace(ran=did)
        return did


def _largest(
    fits: Callable[[int], bool], needed: Callable[[], list[tuple[int, int]]], start: int, most: int
) -> int:
    """Returns the largest batch size that fits; 0 if not even one example does.

    Args:
        fits: compiles a batch size.
        needed: returns the sizes compiled so far, in ascending order, with room left in memory.
        start: the first batch size to try.
        most: the largest one, which need not be rounded.
    """
    low, high = 0, most + 1
    size: int | None = min(start, most)
    while size is not None:
        if fits(size):
            low = size
        else:
            high = size
        size = _next(low, high, needed(), most)
    return low


def _next(low: int, high: int, room: list[tuple[int, int]], most: int) -> int | None:
    """Returns a batch size between two others, on a line through those tried; None without one."""
    if len(room) < 2:
        estimate = 2 * low if low else high // 2
    else:
        (one, left_by_one), (two, left_by_two) = room[-2:]
        per_example = (left_by_one - left_by_two) / (two - one)
        estimate = most if per_example <= 0 else two + math.floor(left_by_two / per_example)
    size = estimate if estimate >= most else _rounded(estimate)
    if size >= high:
        size = most if high > most else _rounded(high - 1)
    if low == 0:
        size = max(size, 1)
    return size if low < size < high else None


def _rounded(size: int) -> int:
    """Returns the next smaller number with few significant binary digits.

    >>> [_rounded(size) for size in (0, 7, 17, 35, 1000)]
    [0, 7, 16, 32, 960]
    """
    shift = max(size.bit_length() - _DIGITS, 0)
    return max(size, 0) >> shift << shift

"""Programs of one step, and of many steps at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from distaff import compile_cache, compiling
from distaff.compiling import Watch
from distaff.data import Chunk, Form, One, Source
from distaff.execution import Execution
from distaff.flops import Flops, flops_of
from distaff.forms import Forms, make_forms
from distaff.metrics import Metric
from distaff.state import TrainState, placed_with
from distaff.throughput import Ledger
from distaff.trainer_config import TrainerConfig
from distaff.typing import Batch, PyTree
from distaff.window import StepFn, Window, empty_window, windowed

WindowedStep: TypeAlias = Callable[[TrainState, Window, Any], tuple[TrainState, Window, Any]]
"""`(state, window, batch) -> (state, window, metrics)`, as `windowed` makes it."""


def make_steps(
    execution: Execution,
    step: StepFn,
    example: tuple[TrainState, Batch],
    config: TrainerConfig,
    *,
    steps_per_epoch: int | None,
    watched: bool,
    watch: Watch | None = None,
) -> Steps:
    """Makes what runs the steps of a run; the step is traced, nothing is compiled.

    Args:
        execution: how programs are made.
        step: a training step as `measured` gives it.
        example: a state and a batch like those of the run.
        config: `steps_per_call`, `log_every_n_steps` and `debug` are read.
        steps_per_epoch: None if it is not known.
        watched: whether the metrics of every step are wanted.
        watch: watches what compiles.
    """
    _, metrics = execution.shapes(step, *example)
    forms = make_forms(
        1 if config.debug else config.steps_per_call,
        metrics,
        steps_per_epoch=steps_per_epoch,
        watched=watched,
        jaxpr=lambda: jax.make_jaxpr(step)(*example),
        file=_choices() if config.tune_process else None,
    )
    every = config.log_every_n_steps
    steps = Steps(
        execution,
        windowed(step),
        metrics,
        forms=forms,
        log_every=every,
        watched=watched,
        watch=watch,
    )
    steps.example = jax.eval_shape(lambda *each: each, *example)
    return steps


def _choices() -> Path | None:
    directory = compile_cache.home()
    return None if directory is None else directory / "forms.json"


def single(step: WindowedStep) -> Callable[..., tuple[TrainState, Window, Any]]:
    """Makes a program of one step.

    Returns:
        `(state, window, source) -> (state, window, metrics)`.
    """

    def program(
        state: TrainState, window: Window, source: Source
    ) -> tuple[TrainState, Window, Any]:
        return step(state, window, source.batch(0))

    return program


def fused(
    step: WindowedStep, empty: Window, metrics: PyTree, *, log_every: int
) -> Callable[..., tuple[TrainState, Window, Window, Any]]:
    """Makes one program of many steps, whose number is an argument: no remainder compiles anew.

    Args:
        step: the step.
        empty: the window before its first step. A window starts anew after each step that is a
            multiple of `log_every`.
        metrics: the metrics of one step, or their shapes, where those of every step are wanted; an
            empty pytree where they are not.
        log_every: steps per window.

    Returns:
        `(state, window, source, span) -> (state, window, windows, metrics)`. `span` is int32
        `[2]`: completed steps before the first one, and how many to run. `windows` are those after
        each step, `[source.capacity, ...]`, and likewise the metrics; rows after the last step
        mean nothing.
    """

    def program(
        state: TrainState, window: Window, source: Source, span: jax.Array
    ) -> tuple[TrainState, Window, Window, Any]:
        def body(index: jax.Array, carry: PyTree) -> PyTree:
            state, window, written = carry
            state, window, measured = step(state, window, source.batch(index))
            row = (window, measured if jax.tree.leaves(metrics) else metrics)
            written = jax.tree.map(lambda rows, leaf: rows.at[index].set(leaf), written, row)
            closed = (span[0] + index + 1) % log_every == 0
            window = jax.tree.map(lambda e, w: jnp.where(closed, e, w), empty, window)
            return state, window, written

        room = jax.tree.map(
            lambda leaf: jnp.zeros((source.capacity, *leaf.shape), leaf.dtype), (empty, metrics)
        )
        state, window, written = jax.lax.fori_loop(0, span[1], body, (state, window, room))
        return state, window, *written

    return program


class Steps:
    """Runs chunks of steps, in the form that suits them.

    Attributes:
        ledger: hears what their time is spent on.
        example: shapes of a state and a batch; None if they are not known.

    Args:
        execution: how programs are made.
        step: the step.
        metrics: the metrics of one step, or their shapes.
        forms: chooses the form.
        log_every: steps per window.
        watched: whether the metrics of every step are wanted, and not only those of windows.
        watch: watches what compiles.
    """

    example: tuple[TrainState, Batch] | None = None

    def __init__(
        self,
        execution: Execution,
        step: WindowedStep,
        metrics: Mapping[str, Metric],
        *,
        forms: Forms,
        log_every: int,
        watched: bool = False,
        watch: Watch | None = None,
    ) -> None:
        self.empty = empty_window(metrics)
        self.log_every, self.forms, self._watched = log_every, forms, watched
        self._examples = 0
        self.ledger = Ledger()
        kept, watch = metrics if watched else {}, watch or Watch()
        self._one = execution.program(single(step), donate=0)
        many = execution.program(fused(step, self.empty, kept, log_every=log_every), donate=0)
        arguments = ("state", "window", "source", "span")
        self._single = watch.over(self._one, "the step", arguments)
        self._fused = watch.over(many, "the fused steps", arguments)

    def form(self) -> Form:
        """Returns the form of the next chunk."""
        return self.forms.form

    def __call__(
        self, state: TrainState, window: Window, chunk: Chunk, step: int
    ) -> tuple[TrainState, Window, Window, list[Any]]:
        """Runs a chunk.

        Args:
            state: given away.
            window: what was measured since the last window was closed.
            chunk: the batches.
            step: completed steps before the first one.

        Returns:
            The new state; the window, new where the last step closes one; the windows after each
            step, `[steps, ...]`, or without that axis for a chunk with room for one only; the
            metrics of each step, none if they are not watched.
        """
        if not self._examples:
            self._examples = chunk.examples
            self.empty = placed_with(self.empty, chunk.source)
            state, window = placed_with((state, window), chunk.source)
        start, num_compiled = time.perf_counter(), compiling.count()
        outer = self.ledger.turn_to("host")
        state, window, windows, metrics = self._hand_over(state, window, chunk, step)
        self.ledger.handed(windows.first_bad_step)
        self.ledger.turn_to(outer)
        if self.forms.measuring:
            jax.block_until_ready(state)
            seconds = (time.perf_counter() - start) / chunk.num_steps
            counts = compiling.count() == num_compiled and self._is_like_first(chunk)
            self.forms.took(seconds if counts else None)
        return state, window, windows, metrics

    def flops(self) -> Flops | None:
        """Counts the FLOPs of one step; see `flops_of`."""
        if self.example is None:
            return None
        state, batch = self.example
        return flops_of(self._one, state, self.empty, One(batch))

    def _hand_over(
        self, state: TrainState, window: Window, chunk: Chunk, step: int
    ) -> tuple[TrainState, Window, Window, list[Any]]:
        if chunk.source.capacity == 1:
            state, windows, measured = self._single(state, window, chunk.source)
            window = self.empty if (step + 1) % self.log_every == 0 else windows
            metrics = [measured] * self._watched
        else:
            span = np.array([step, chunk.num_steps], np.int32)
            state, window, windows, measured = self._fused(state, window, chunk.source, span)
            metrics = [_row(measured, row) for row in range(chunk.num_steps * self._watched)]
        return state, window, windows, metrics

    def _is_like_first(self, chunk: Chunk) -> bool:
        """Tells whether a chunk has as many examples per step as the first, in the form asked."""
        is_asked = (chunk.source.capacity == 1) == (self.forms.form.capacity == 1)
        return is_asked and chunk.examples == self._examples


def _row(tree: PyTree, row: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[row], tree)

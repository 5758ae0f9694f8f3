"""Profiler: records a trace of host and device for a window of steps."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import jax

from distaff.callbacks.callback import Callback, StepInfo
from distaff.callbacks.chunk_scope import ChunkScope
from distaff.core.paths import as_path
from distaff.core.warnings import warn
from distaff.errors import ConfigError, StateError

_log = logging.getLogger("distaff")

_WARM_UP_CHUNKS = 16
"""After these, everything is compiled, and prefetching has started."""


class Profiler(Callback):
    """Records a window of training steps with `jax.profiler`; fused steps stay fused.

    The trace is written to the folder `profile/` of the run directory: `*.trace.json.gz` opens in
    https://ui.perfetto.dev, and the folder in XProf or in TensorBoard with its profile plugin. Each
    chunk of steps is annotated as `train` with the number of its first step. The window consists of
    whole chunks of one epoch, without evaluation. The host waits for the device before and after
    the window.

    Args:
        first_step: the first step to record, counted from 1 over the whole training; recording
            starts with its chunk. None starts after sixteen chunks, when everything is compiled.
        num_steps: minimum number of steps to record, unless the epoch ends before.
        path: the folder to write to instead of `profile/` in the run directory.
        python: record calls of Python functions too, which slows the host.

    Raises:
        ConfigError: an argument is out of its range.
    """

    def __init__(
        self,
        *,
        first_step: int | None = None,
        num_steps: int = 10,
        path: Path | str | None = None,
        python: bool = False,
    ) -> None:
        if num_steps < 1 or (first_step is not None and first_step < 1):
            raise ConfigError(
                "Profiler needs num_steps >= 1, and first_step >= 1 or None; "
                f"got num_steps={num_steps}, first_step={first_step}."
            )
        self.first_step, self.num_steps, self.python = first_step, num_steps, python
        self.path = None if path is None else as_path(path, "path")
        self._reset()

    def on_training_start(self, info: StepInfo) -> None:
        """Resets the state of an earlier run."""
        self._reset()

    def on_training_end(self, info: StepInfo) -> None:
        """Warns if no step was recorded."""
        if not self._done:
            start = f"step {self.first_step}" if self.first_step else f"chunk {_WARM_UP_CHUNKS + 1}"
            warn(
                f"Profiler recorded nothing: it starts at {start}, and the run ended at step "
                f"{info.step} (chunk {self._chunks}). Set first_step to a step of the run.",
                stacklevel=2,
            )

    @contextmanager
    def around_epoch(self, directory: Path | None) -> Generator[ChunkScope]:
        """Profiles an epoch; a running trace ends with it.

        Raises:
            ConfigError: there is no folder for the trace.
        """
        if self.path is None and directory is None:
            raise ConfigError(
                "A profile needs a folder, and this run writes none (root=None). Use "
                "Profiler(path=...), or give the trainer a root."
            )
        self._target = self.path or Path(str(directory)) / "profile"
        try:
            yield self._around_chunk
        finally:
            self._stop()

    @contextmanager
    def _around_chunk(self, steps: range) -> Generator[None]:
        self._chunks += 1
        if not self._running and not self._done and self._starts_with(steps):
            self._start()
        if not self._running:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=steps[0], num_steps=len(steps)):
            yield
        self._num_recorded += len(steps)
        if self._num_recorded >= self.num_steps:
            self._stop()

    def _reset(self) -> None:
        self._running = self._done = False
        self._chunks = self._num_recorded = 0

    def _starts_with(self, steps: range) -> bool:
        if self.first_step is None:
            return self._chunks > _WARM_UP_CHUNKS
        return steps[-1] >= self.first_step

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = int(self.python)
        _wait_for_device()
        try:
            jax.profiler.start_trace(self._target, profiler_options=options)
        except RuntimeError as error:
            raise StateError(
                f"JAX records one profile at a time, and another one is running ({error}). Give "
                "several Profilers windows that do not overlap, or end your own trace first."
            ) from error
        self._running = True

    def _stop(self) -> None:
        if self._running:
            self._running, self._done = False, True
            _wait_for_device()
            jax.profiler.stop_trace()
            _log.info("profile of %d steps: %s", self._num_recorded, self._target)


def _wait_for_device() -> None:
    """Waits for all live arrays."""
    jax.block_until_ready([array for array in jax.live_arrays() if not array.is_deleted()])

"""The profiler: what host and device do in some steps of a run, as a trace to look at."""

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
"""By then everything is compiled, and the reader of a slow loader has started."""


class Profiler(Callback):
    """Records a window of steps with `jax.profiler`, as the run is: fused steps stay fused.

    The trace is written to the folder `profile/` of the run directory: `*.trace.json.gz` opens in
    https://ui.perfetto.dev, and the folder in XProf or in TensorBoard with its profile plugin. Each
    chunk of steps is annotated as `train` with the number of its first step. Chunks are recorded
    whole, and the window ends with the epoch at the latest. A window records one epoch's training,
    no evaluation. The host waits for the device before the window and after it.

    Args:
        first_step: the step to begin with, counted from 1 in the whole training: the chunk that
            holds it is the first. None begins after sixteen chunks: then everything is compiled.
        num_steps: record chunks until they have this many steps.
        path: where to write instead of the run directory's `profile/`.
        python: record each call of a Python function too, which slows the host.

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
        self._forget()

    def on_training_start(self, info: StepInfo) -> None:
        """Forgets an earlier run."""
        self._forget()

    def on_training_end(self, info: StepInfo) -> None:
        """Warns if no step was recorded."""
        if not self._done:
            begin = f"step {self.first_step}" if self.first_step else f"chunk {_WARM_UP_CHUNKS + 1}"
            warn(
                f"Profiler recorded nothing: it was to begin at {begin}, and the run ended at step "
                f"{info.step} (chunk {self._chunks}). Set first_step to a step of the run.",
                stacklevel=2,
            )

    @contextmanager
    def around_epoch(self, directory: Path | None) -> Generator[ChunkScope]:
        """Runs an epoch; a trace that is not at its end yet ends with it.

        Raises:
            ConfigError: there is no place for the trace.
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
        if not self._running and not self._done and self._begins(steps):
            self._start()
        if not self._running:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=steps[0], num_steps=len(steps)):
            yield
        self._recorded += len(steps)
        if self._recorded >= self.num_steps:
            self._stop()

    def _forget(self) -> None:
        self._running = self._done = False
        self._chunks = self._recorded = 0

    def _begins(self, steps: range) -> bool:
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
                f"There is one profile at a time, and another one is running ({error}). Give "
                "several Profilers windows of steps that do not meet, or end your own trace first."
            ) from error
        self._running = True

    def _stop(self) -> None:
        """Ends the trace if it runs."""
        if self._running:
            self._running, self._done = False, True
            _wait_for_device()
            jax.profiler.stop_trace()
            _log.info("profile of %d steps: %s", self._recorded, self._target)


def _wait_for_device() -> None:
    """Waits for what was handed to the device: for all results that anybody holds."""
    jax.block_until_ready([array for array in jax.live_arrays() if not array.is_deleted()])

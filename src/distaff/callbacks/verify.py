"""Verify: repeats steps during training, as a check of the hardware."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Literal

from distaff.callbacks.callback import Callback, StepInfo
from distaff.core.config.cadence import Cadence
from distaff.core.config.options import check_choice
from distaff.core.warnings import warn
from distaff.errors import ReproducibilityError
from distaff.execution.dispatch.repetition import BitDifference

_log = logging.getLogger("distaff")

_EVERY = Cadence(
    ("steps", "seconds"), number="steps", why="Epochs differ in length; write the number of steps."
)


class Verify(Callback):
    """Runs a step again from time to time, and compares the bits of both results.

    Faulty hardware may compute wrong numbers without an error (silent data corruption). A repeated
    step uses the same program, state and batch, so its loss, metrics and every array of the new
    state must have the same bits. Of fused steps, the whole program is repeated. The numbers of the
    training do not change. A repetition costs one more step and waits for the device; it needs
    memory for two further states.

    If the bits differ, a third execution decides which result is right. With
    `on_difference="error"` the run ends: `trainer.state` is the state before these steps, no
    checkpoint is written, and the run resumes from its last one. With `"warn"` it continues with
    the result that two of three executions agree on.

    Args:
        every: how often, as `"1000 steps"` or a duration such as `"10m"`; a number counts steps.
        on_difference: `"error"` raises `ReproducibilityError`, `"warn"` logs a warning.
        clock: returns seconds; it never goes backwards.

    Attributes:
        num_repeated: programs of steps that this run has repeated.
        num_different: the number of these whose bits differed.

    Raises:
        ConfigError: an argument is out of its range.
    """

    def __init__(
        self,
        every: Any = "1000 steps",
        *,
        on_difference: Literal["error", "warn"] = "error",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._every = _EVERY.parse("every", every)
        self.every = str(self._every)
        check_choice("on_difference", on_difference, Literal["error", "warn"])
        self.on_difference, self._clock = on_difference, clock
        self._start()

    def _start(self) -> None:
        self.num_repeated = self.num_different = 0
        self._since = self._clock()

    def on_training_start(self, info: StepInfo) -> None:
        """Resets the counts of an earlier run."""
        self._start()

    def must_repeat(self, steps: range) -> bool:
        """Whether to repeat these steps: one step, or one program of steps."""
        if self._every.unit == "steps":
            every = int(self._every.count)
            is_due = steps[-1] // every > (steps[0] - 1) // every
        else:
            now = self._clock()
            is_due = now - self._since >= self._every.count
            self._since = now if is_due else self._since
        self.num_repeated += is_due
        return is_due

    def report(self, difference: BitDifference) -> None:
        """Raises an error or logs a warning with the steps and the arrays that differ.

        Raises:
            ReproducibilityError: under `on_difference="error"`.
        """
        self.num_different += 1
        if difference.agrees is None:
            cause = (
                "The program is not deterministic, or the hardware is faulty. To find out, pass "
                "deterministic=True to the trainer."
            )
        else:
            cause = "The hardware may be faulty: check the device and its memory."
        text = f"{difference} {cause}"
        if self.on_difference == "error":
            raise ReproducibilityError(
                f"{text} No checkpoint has these steps. To resume from the last checkpoint, run "
                "the same command again, on another machine if possible."
            )
        _log.warning("%s", text)
        warn(text, stacklevel=2)

    def on_training_end(self, info: StepInfo) -> None:
        """Logs how many programs were repeated, and how many of them differed."""
        _log.info(
            "Verify: repeated %d programs of steps, %d of them with other bits",
            self.num_repeated,
            self.num_different,
        )

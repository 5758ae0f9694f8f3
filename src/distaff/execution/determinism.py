"""`deterministic=True`: makes the backend deterministic, and repeats the first steps of a run."""

from __future__ import annotations

import logging
import os
import re
from typing import Any, Literal, TypeAlias

import jax

from distaff.core.config.options import check_choice
from distaff.core.warnings import warn
from distaff.errors import ConfigError, ReproducibilityError
from distaff.execution.allocator import has_started, on_cpu_alone
from distaff.execution.dispatch.repetition import BitDifference

_log = logging.getLogger("distaff")

Deterministic: TypeAlias = bool | Literal["warn"]

_FLAG = "--xla_gpu_deterministic_ops"
_SETTING = re.compile(rf"(?:^|\s){_FLAG}(?:=(\S+))?(?=\s|$)")


def check_deterministic(name: str, value: Any) -> Any:
    """Checks that a value is True, False or "warn"."""
    return value if isinstance(value, bool) else check_choice(name, value, Literal["warn"])


def ask_backend() -> None:
    """Sets XLA's flag for deterministic programs, if JAX may start on a GPU and has not started."""
    flags = os.environ.get("XLA_FLAGS", "")
    if _FLAG not in flags and not on_cpu_alone() and not has_started():
        os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}=true".strip()


def check_backend() -> None:
    """Checks that programs on a GPU are deterministic. Starts JAX's backend.

    Raises:
        ConfigError: JAX started without the flag, or the flag turns it off.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if jax.default_backend() != "gpu" or _is_set(flags):
        return
    late = "turns it off" if _FLAG in flags else "has no such flag, and JAX has already started"
    raise ConfigError(
        f"deterministic=True needs {_FLAG}=true on a GPU, before JAX starts, but "
        f"XLA_FLAGS={flags!r} {late}. Set XLA_FLAGS={_FLAG}=true in the environment of the "
        "program, or create the trainer before any JAX array."
    )


def _is_set(flags: str) -> bool:
    values = _SETTING.findall(flags)
    return bool(values) and values[-1].lower() in ("", "1", "true")


class FirstSteps:
    """Repeats the first program of steps after each start of a run.

    Args:
        deterministic: True to raise an error if its bits differ, "warn" to log a warning.
    """

    def __init__(self, deterministic: Deterministic) -> None:
        self._policy, self._is_done = deterministic, False

    def must_repeat(self, steps: range) -> bool:
        """Whether these are the first steps."""
        is_first, self._is_done = not self._is_done, True
        return is_first

    def report(self, difference: BitDifference) -> None:
        """Raises an error or logs a warning that names the arrays which are inexact.

        Raises:
            ReproducibilityError: the policy is not "warn".
        """
        text = (
            f"The training step is not deterministic. {difference} Look for random numbers that "
            "do not come from ctx.rng, callbacks to Python and, on a GPU, convolutions."
        )
        if self._policy != "warn":
            raise ReproducibilityError(
                f"{text} To train all the same, pass deterministic='warn' or False."
            )
        _log.warning("%s", text)
        warn(text, stacklevel=2)

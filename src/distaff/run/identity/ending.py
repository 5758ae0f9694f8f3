"""Classifies the error that ended a run."""

from __future__ import annotations

import re
from typing import Any

import jax

from distaff.errors import (
    BarrierError,
    CheckpointError,
    DataFileError,
    NonFiniteError,
    ReproducibilityError,
    RunDirectoryError,
)

_OF_THE_MACHINE = (OSError, MemoryError, jax.errors.JaxRuntimeError)
_STATUS = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")
"""How an error of XLA begins. JAX raises some as `ValueError`, such as "UNKNOWN: Gloo AllGather
failed" if another process has died."""

_OF_DISTAFF = (
    *(CheckpointError, RunDirectoryError, NonFiniteError),
    *(BarrierError, DataFileError, ReproducibilityError),
)


def ending(error: BaseException) -> dict[str, Any]:
    """Returns the status of a run that an error ended, and facts for `status.json`.

    The next start resumes a run that was ended by the machine or by Distaff. One that was ended by
    the user's code is over: `resumable` is False.
    """
    facts: dict[str, Any] = {"reason": f"{type(error).__name__}: {error}"}
    if isinstance(error, KeyboardInterrupt):
        return {"status": "interrupted", **facts}
    if any(cls.__name__ == "TrialPruned" for cls in type(error).__mro__):  # Optuna's
        return {"status": "pruned", **facts}
    is_of_xla = type(error) is ValueError and _STATUS.match(str(error)) is not None
    is_cut = is_of_xla or isinstance(error, (*_OF_THE_MACHINE, *_OF_DISTAFF))
    return {"status": "failed", "resumable": is_cut, **facts}

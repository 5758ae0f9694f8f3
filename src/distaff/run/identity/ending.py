"""Ending: what an error that ends a run says about it."""

from __future__ import annotations

from typing import Any

import jax

from distaff.errors import (
    BarrierError,
    CheckpointError,
    DataFileError,
    NonFiniteError,
    RunDirectoryError,
)

_OF_THE_MACHINE = (OSError, MemoryError, jax.errors.JaxRuntimeError)
_OF_DISTAFF = (CheckpointError, RunDirectoryError, NonFiniteError, BarrierError, DataFileError)


def ending(error: BaseException) -> dict[str, Any]:
    """Returns the status of a run that an error has ended, and facts, as `status.json` has them.

    A run that the machine has ended, or that Distaff could not continue, is resumed by the next
    start. One that was ended by the user's own code has ended: `resumable` is False.

    Args:
        error: what `train_model` raises.
    """
    facts: dict[str, Any] = {"reason": f"{type(error).__name__}: {error}"}
    if isinstance(error, KeyboardInterrupt):
        return {"status": "interrupted", **facts}
    if any(cls.__name__ == "TrialPruned" for cls in type(error).__mro__):  # of Optuna
        return {"status": "pruned", **facts}
    is_cut = isinstance(error, (*_OF_THE_MACHINE, *_OF_DISTAFF))
    return {"status": "failed", "resumable": is_cut, **facts}

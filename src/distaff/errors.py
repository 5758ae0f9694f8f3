"""The exceptions Distaff raises, and the two phrases every message is built from.

Each message states the rule, then the offending values by name, then the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import jax


class DistaffError(Exception):
    """Base class of every error that Distaff raises on purpose."""


class ConfigError(DistaffError, ValueError):
    """An option is unknown, out of range, or contradicts another."""


class BatchError(DistaffError, ValueError):
    """A batch, or the loader that yields it, does not have the agreed form."""


class ChangedBatchesError(BatchError):
    """A loader that goes to a position has not yielded the same batches on the way there.

    It stands there all the same: `loader.set_state(loader.get_state())` goes on with it.
    """


class DataFileError(DistaffError, ValueError):
    """A file of a data set is missing, unreadable, or not in its published format."""


class LossError(DistaffError, ValueError):
    """A loss or a metric returned by the user's function has the wrong form."""


class UnknownNameError(DistaffError, AttributeError):
    """An attribute that other libraries have, under the name that it has there."""


class MaskError(LossError):
    """A mask meets metrics that are not values per example."""


class StateError(DistaffError, ValueError):
    """A train state is used before it is complete, or with a member it does not have."""


class MetricError(DistaffError, ValueError):
    """A metric is unknown, or two metrics of one name cannot be merged."""


class UnknownMetricError(MetricError, KeyError):
    """A metric is asked for that is not there; the nearest one is named."""

    def __str__(self) -> str:
        return str(self.args[0])


class CheckpointError(DistaffError, ValueError):
    """A checkpoint is missing, unreadable, or belongs to another model."""


class RunDirectoryError(DistaffError, OSError):
    """The directory of a run cannot be created or written."""


class RunInUseError(RunDirectoryError):
    """The directory of a run is in use by another process."""


class BarrierError(DistaffError, TimeoutError):
    """Not all processes have come to where all of them must wait for each other."""


class MissingExtraError(DistaffError, ImportError):
    """A feature needs an optional package that is not installed."""


class NonFiniteError(DistaffError, FloatingPointError):
    """The loss became NaN or infinite during training."""


class RecompileError(DistaffError, RuntimeError):
    """A program compiled again after its first time, under `recompile="error"`."""


class RecompileWarning(UserWarning):
    """A program compiled again after its first time."""


class ModeWarning(UserWarning):
    """A model's dropout or running statistics do not follow whether it trains."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a sentence that lists the known names, the closest one first.

    Args:
        name: the name that was not found.
        known: all names that would have been accepted.

    Returns:
        `"Did you mean 'adamw'? Known: 'adam', 'adamw'."`; no question where nothing is close.
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    listed = ", ".join(repr(known_name) for known_name in names) or "none"
    question = f"Did you mean {close[0]!r}? " if close else ""
    return f"{question}Known: {listed}."


def leaf_name(path: tuple[Any, ...]) -> str:
    """Returns the path of a pytree leaf as users write it: `params/Dense_0/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "(the whole tree)"

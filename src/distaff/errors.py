"""The exceptions that Distaff raises.

Each message states what is wrong, then the values by name, then the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class DistaffError(Exception):
    """Base class of every error that Distaff raises on purpose."""


class ConfigError(DistaffError, ValueError):
    """An option is unknown, out of range, or contradicts another."""


class BatchError(DistaffError, ValueError):
    """A batch, or the loader that yields it, is invalid."""


class ChangedBatchesError(BatchError):
    """A loader that read up to a saved position yielded other batches than before.

    The loader is at that position all the same: `loader.set_state(loader.get_state())` continues
    from there.
    """


class DataFileError(DistaffError, ValueError):
    """A file of a dataset is missing, unreadable, or not in its published format."""


class LossError(DistaffError, ValueError):
    """A user's function returned an invalid loss or metric."""


class UnknownNameError(DistaffError, AttributeError):
    """An attribute was accessed by its name in another library."""


class MaskError(LossError):
    """A mask was given, but a metric has no value per example."""


class StateError(DistaffError, ValueError):
    """A train state is incomplete, or lacks the requested field."""


class FixedAttributeError(StateError, AttributeError):
    """A read-only attribute of a trainer was set."""


class MetricError(DistaffError, ValueError):
    """A metric is unknown, or two metrics of one name cannot be merged."""


class UnknownMetricError(MetricError, KeyError):
    """The requested metric does not exist; the message suggests the nearest name."""

    def __str__(self) -> str:
        return str(self.args[0])


class CheckpointError(DistaffError, ValueError):
    """A checkpoint is missing, unreadable, or belongs to another model."""


class RunDirectoryError(DistaffError, OSError):
    """A run directory cannot be created or written."""


class RunInUseError(RunDirectoryError):
    """A run directory is in use by another process."""


class BarrierError(DistaffError, TimeoutError):
    """Not all processes reached a barrier in time."""


class MissingExtraError(DistaffError, ImportError):
    """A feature needs an optional package that is not installed."""


class NonFiniteError(DistaffError, FloatingPointError):
    """The loss became NaN or infinite during training."""


class ReproducibilityError(DistaffError, RuntimeError):
    """A step gave other bits when it was run again on the same state and batch."""


class RecompileError(DistaffError, RuntimeError):
    """A program was compiled a second time, under `recompile="error"`."""


class RecompileWarning(UserWarning):
    """A program was compiled a second time."""


class ModeWarning(UserWarning):
    """A model's dropout or running statistics ignore the switch between training and evaluation."""


_MOST_NAMES = 100
"""The most names to list in an error."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a sentence that lists the known names, the closest one first.

    Args:
        name: the unknown name.
        known: all accepted names.

    Returns:
        `"Did you mean 'adamw'? Known: 'adam', 'adamw'."`; without the question if no name is close.
        Of more than 100 names it lists ten.
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    question = f"Did you mean {close[0]!r}? " if close else ""
    is_long = len(names) > _MOST_NAMES
    if is_long:
        names = sorted(difflib.get_close_matches(name, names, n=10, cutoff=0))
    listed = ", ".join(repr(known_name) for known_name in names) or "none"
    return f"{question}{'Among others' if is_long else 'Known'}: {listed}."


def leaf_name(path: tuple[Any, ...]) -> str:
    """Returns the path of a pytree leaf as users write it: `params/Dense_0/kernel`."""
    import jax  # here: the command line starts without JAX

    return jax.tree_util.keystr(path, simple=True, separator="/") or "(the whole tree)"

"""Loaders: what yields the batches of an epoch, and can say and restore how far it got."""

from __future__ import annotations

from distaff.data.arrays import ArrayLoader
from distaff.data.builtin import digits
from distaff.data.entry import entry
from distaff.data.loader import (
    Loader,
    as_loader,
    epoch_of,
    first_batch,
    num_batches,
    num_examples,
)
from distaff.data.stream import Stream

__all__ = [
    "ArrayLoader",
    "Loader",
    "Stream",
    "as_loader",
    "digits",
    "entry",
    "epoch_of",
    "first_batch",
    "num_batches",
    "num_examples",
]

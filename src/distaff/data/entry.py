"""What of a batch is what: an entry found under one of the names that people give it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from distaff.core.typing import Batch
from distaff.errors import BatchError


def entry(batch: Batch, names: Sequence[str], position: int, *, what: str, override: str) -> Any:
    """Returns the entry of a batch that has one of these names, or stands at this position.

    Args:
        batch: a dict or dataclass, whose entries have names; or a tuple or list, whose do not.
        names: names to look for, in this order.
        position: where it is in a tuple or list.
        what: what is looked for, for the error: `"The model's input"`.
        override: the method to override for other batches, for the error.

    Raises:
        BatchError: it is not there; what the batch holds is listed.
    """
    if isinstance(batch, tuple | list) and not hasattr(batch, "_fields"):
        if position < len(batch):
            return batch[position]
        held = f"{len(batch)} items"
    else:
        entries = named(batch)
        for name in names:
            if name in entries:
                return entries[name]
        held = str(sorted(entries)) if entries else type(batch).__name__
    raise BatchError(
        f"{what} is looked for in a batch under the names {list(names)}, or at position "
        f"{position} of a tuple; this batch holds {held}. Override {override} to return it."
    )


def named(batch: Batch) -> Mapping[str, Any]:
    """Returns the entries of a batch by name; none where they have no names."""
    if isinstance(batch, Mapping):
        return batch
    if hasattr(batch, "_asdict"):
        return batch._asdict()
    if dataclasses.is_dataclass(batch):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {}

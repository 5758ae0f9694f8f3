"""The outline of a run: what its configuration says about its length and its best model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from distaff.metrics.monitor import Monitor


class Outline(NamedTuple):
    """What the configuration of a run says about its length and its best model.

    Attributes:
        num_epochs: number of the last epoch; None if unknown.
        steps_per_epoch: steps of an epoch; None if unknown.
        batch_size: examples of a batch; 0 if unknown.
        monitor: ranks models; None if unknown.
    """

    num_epochs: int | None
    steps_per_epoch: int | None
    batch_size: int
    monitor: Monitor | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Outline:
        """Returns the outline of a run, given its `config.json`."""
        given, first = config.get("num_epochs"), _whole(config.get("first_epoch"))
        identity = _mapping(config.get("identity"))
        train = _mapping(_mapping(identity.get("data")).get("train"))
        total, count = _whole(identity.get("total_steps")), _whole(given)
        length = _whole(config.get("steps_per_epoch"))
        if not length:
            length = math.ceil(total / count) if count else _whole(train.get("length"))
        if not count and length:  # such as "780 steps"
            count = math.ceil(total / length)
        return cls(
            num_epochs=count + max(0, first - 1) if count else None,
            steps_per_epoch=length or None,
            batch_size=_batch_size(train),
            monitor=_monitor(_mapping(config.get("monitor"))),
        )


def _batch_size(loader: Mapping[str, Any]) -> int:
    """Returns the first axis of the first array of a batch, such as `float32[32, 8]`."""
    arrays = [str(each) for each in _mapping(loader.get("batch")).values()]
    found = re.match(r"\w+\[(\d{1,9})\b", arrays[0]) if arrays else None
    return int(found[1]) if found else 0


def _monitor(facts: Mapping[str, Any]) -> Monitor | None:
    name, mode = facts.get("name"), facts.get("mode")
    if isinstance(name, str) and name and mode in ("min", "max"):
        return Monitor(name, mode, insist=True)
    return None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0

"""Draws the learning curves of a run into its directory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distaff.core.files import write_whole
from distaff.data import num_batches
from distaff.errors import MetricError
from distaff.loggers.history import History
from distaff.run.events import Plan

_log = logging.getLogger("distaff")

CURVES = "figures/learning_curves.svg"


def save_curves(history: History, directory: Path) -> None:
    """Writes the learning curves to `figures/`, if an epoch is recorded; never raises an error."""
    target = directory / CURVES
    try:
        drawing = history.svg()
        target.parent.mkdir(exist_ok=True)
        write_whole(target, drawing)
    except MetricError:
        return
    except Exception as error:
        _log.warning("%s cannot be drawn: %s: %s", target, type(error).__name__, error)


def run_title(record: Mapping[str, Any], directory: Path | None, plan: Plan) -> str:
    """Returns the title of a run's figures: its name, seed, and sizes of its loaders."""
    options = record["options"]
    name = options["name"] or str(record["trainer"]["$type"]).rpartition(":")[2].rpartition(".")[2]
    if directory is not None:
        name = f"{directory.parent.name}/{directory.name}"
    sizes = [
        size_of(split, each)
        for split, each in {"train": plan.train_loader, **plan.val_loaders}.items()
    ]
    return ", ".join([f"{name}: seed {options['seed']}", *filter(None, sizes)])


def size_of(split: str, loader: Any) -> str:
    """Returns a split and its number of examples, or else of batches; empty if unknown."""
    count, length = getattr(loader, "num_examples", None), num_batches(loader)
    if isinstance(count, int):
        return f"{split} {count:,} examples"
    return "" if length is None else f"{split} {length:,} batches"

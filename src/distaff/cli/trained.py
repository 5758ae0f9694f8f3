"""Loads the trainer of a run by its path, and the data for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distaff import tasks
from distaff.checkpoint import located
from distaff.checkpoint.record import example_from
from distaff.cli.files import arrays, selection, tables
from distaff.cli.recipes import load_code
from distaff.errors import ConfigError
from distaff.trainer.module import TrainerModule


def loaded(run: Path, code: str | None) -> TrainerModule:
    """Loads the trainer of a run. Its class is a task, or in `code`; no other module is imported.

    Raises:
        ConfigError: the class of the trainer is not known.
        CheckpointError: there is no complete checkpoint.
    """
    if code is not None:
        load_code(code)
    recorded = located(run).record()["trainer"]["$type"]
    module, _, name = str(recorded).partition(":")
    kind = getattr(tasks, name, None) if module.startswith("distaff.tasks") else None
    kind = kind or getattr(sys.modules.get(module), name, None)
    if not (isinstance(kind, type) and issubclass(kind, TrainerModule)):
        raise ConfigError(
            f"The class {name!r} of this run is in the module {module!r}, which is not imported: "
            "names in files never are. Pass its file or module, such as --code train.py."
        )
    return kind.load_from_checkpoint(run)


def data_of(
    run: Path, trainer: TrainerModule, path: Path, columns: Sequence[str], *, with_targets: bool
) -> Any:
    """Reads a file as the trainer of a run takes it, and names the columns that it does not take.

    Raises:
        ConfigError: the file has another ending, or no columns fit the model's input.
        DataFileError: the file is missing or damaged, or a value is not a number.
    """
    if path.suffix in tables.ENDINGS:
        coding = trainer.config.coding
        example = None if coding else example_from(located(run).record()["example_batch"])
        found = selection.select(
            tables.read_table(path), example, coding, columns, with_targets=with_targets
        )
        if found.unused:
            print(f"{path}: columns not used: {', '.join(found.unused)}", file=sys.stderr)
        return found.batch
    if columns:
        raise ConfigError(
            f"--columns names columns of a .csv or .parquet file; got {str(path)!r}. Leave it out."
        )
    return arrays.read(path)

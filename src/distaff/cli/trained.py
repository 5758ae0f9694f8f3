"""Loads the trainer of a run by its path."""

from __future__ import annotations

import sys
from pathlib import Path

from distaff import tasks
from distaff.checkpoint import located
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

"""Loads the arrays of a model from a checkpoint into a trainer."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distaff.checkpoint import Located
from distaff.checkpoint.record import example_from
from distaff.core.typing import Batch
from distaff.errors import CheckpointError
from distaff.run.workspace import Workspace
from distaff.step.averages import RAW
from distaff.step.state import TrainState


def load(
    here: Workspace,
    found: Located,
    record: Mapping[str, Any] | None,
    set_up: Callable[[Batch], None],
) -> None:
    """Restores the model of a trainer that was just created.

    Args:
        here: the trainer's workspace.
        found: the checkpoint.
        record: the record of the run; None if the user passed a batch.
        set_up: sets up the trainer again, with a batch of another size.
    """
    try:
        restore(here, found)
    except CheckpointError:
        if record is None or not here.ready_state().collections:
            raise
        # A variable may have the size of the batch, such as the carry of an RNN.
        with explained(found.origin):
            set_up(example_from(record["example_batch"], whole=True))
        restore(here, found)
    here.judged = found.store.info(found.step).get("judged", RAW)


def restore(here: Workspace, found: Located) -> None:
    """Restores a model, with the averages of its weights that the checkpoint has."""
    here.begin_averages(found.store.info(found.step).get("averages", ()), keep=False)
    here.restore(found.store, found.step, _trained(here.ready_state()))


def _trained(state: TrainState) -> list[str]:
    """Returns the members that a loaded model needs: all but optimizer state and guard.

    A member of a subclass may be None until training starts.
    """
    members = state.arrays()
    always = ("step", "params", "batch_stats", "collections", "rng")
    return [
        name
        for name, value in members.items()
        if name in always or (name not in ("opt_state", "guard") and value is not None)
    ]


@contextmanager
def explained(file: Path) -> Generator[None]:
    """Re-raises errors of a wrong record as one that names the record."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"The trainer cannot be set up as {file} records it: {error} "
            "Pass what differs to load_from_checkpoint: model, example_batch, or an option."
        ) from error

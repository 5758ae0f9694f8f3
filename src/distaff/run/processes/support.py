"""Checks that a run can be trained by several processes, before its first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from distaff.callbacks import EarlyStopping, Timer, Webhook
from distaff.core.digest import digest, sample_digest
from distaff.core.typing import Batch
from distaff.data import Loader
from distaff.data.loader import has_one_order, num_batches, sources
from distaff.distributed.failure import leave_on_errors
from distaff.errors import ConfigError
from distaff.execution.processes import check_one_process, gathered, is_first
from distaff.run.display import make_display
from distaff.run.run import Run, RunOptions
from distaff.run.workspace import Workspace

_OURS = (EarlyStopping, Timer, Webhook)


def check_processes(options: RunOptions, run: Run) -> None:
    """Checks the options, loaders and callbacks of a run.

    Does nothing with one process.

    Raises:
        ConfigError: several processes cannot train this run.
    """
    if jax.process_count() == 1:
        return
    leave_on_errors()
    for name, value in _unsupported(options, run):
        check_one_process(f"A run with {name}={value!r}")
    for callback in run.callbacks.callbacks:
        if type(callback).__module__.startswith("distaff.") and not isinstance(callback, _OURS):
            check_one_process(f"The callback {type(callback).__name__}")
    for name, loader in {"train": run.plan.train_loader, **run.plan.val_loaders}.items():
        check_order(loader, name)


def check_order(loader: Loader, name: str) -> None:
    """Checks that every process reads the same batches from a loader, in the same order.

    Raises:
        ConfigError: the kind of loader does not promise that.
    """
    if jax.process_count() == 1:
        return
    for source in sources(loader):
        if not has_one_order(source):
            raise ConfigError(
                f"With several processes, each must read the same batches in the same order; the "
                f"{name} loader, a {type(source).__name__}, does not promise that. Use "
                "data.ArrayLoader, data.from_examples or a list of batches; or set the attribute "
                "has_one_order = True of your own loader if its batches depend on its arguments "
                "alone."
            )


def quieten(workspace: Workspace) -> None:
    """Turns the display off in all processes but the first."""
    if jax.process_count() > 1 and not is_first():
        workspace.display = make_display(False)


def check_prepared(run: Run, first_batches: Mapping[str, Batch]) -> None:
    """Checks that a prepared run is the same in all processes.

    Args:
        run: the run.
        first_batches: the first batch of each loader, by name.

    Raises:
        ConfigError: it is not, or it has a step that the user's class compiles.
    """
    if jax.process_count() == 1:
        return
    if run.workspace.own_step is not None:
        check_one_process("A step that create_jitted_functions compiles")
    loaders = {"train": run.plan.train_loader, **run.plan.val_loaders}
    check_same_batches({name: (each, first_batches[name]) for name, each in loaders.items()})


def check_same_batches(loaders: Mapping[str, tuple[Loader, Batch]]) -> None:
    """Checks that all processes have read the same first batch from each loader.

    Args:
        loaders: loaders with their first batches, by name.

    Raises:
        ConfigError: they have not.
    """
    own = {
        name: digest(num_batches(loader), *map(sample_digest, jax.tree.leaves(batch)))
        for name, (loader, batch) in loaders.items()
    }
    for index, other in enumerate(gathered(own)):
        differ = [name for name in {*own, *other} if own.get(name) != other.get(name)]
        if differ:
            raise ConfigError(
                f"Process {jax.process_index()} and process {index} have read different batches "
                f"from the {' and the '.join(sorted(differ))} loader, or another number of them. "
                "Give every process all of the data, in the same order and with the same seed: "
                "each uses only its part of a batch."
            )


def _unsupported(options: RunOptions, run: Run) -> list[tuple[str, Any]]:
    """Returns the options that need one process, with their values."""
    limit = run.plan.limit
    needs = {
        "debug": options.debug,
        "deterministic": options.deterministic,
        "on_bad_numbers": options.on_bad_numbers == "rollback",
        "on_loss_spike": options.on_loss_spike == "rollback",
        "on_failed_save": options.on_failed_save == "warn",
    }
    found = [(name, getattr(options, name)) for name, is_used in needs.items() if is_used]
    if limit is not None and limit.unit == "seconds":
        found.append(("num_epochs", str(limit)))
    return found

"""Trains one trainer with several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distaff.core.config.checks import whole
from distaff.data import closing_made
from distaff.errors import ConfigError
from distaff.execution.processes import check_one_process
from distaff.run.display import make_display
from distaff.run.events import make_plan
from distaff.trainer.module import TrainerModule
from distaff.trainer.training import Inputs
from distaff.trainer.trials import prepared_run
from distaff.tune.population.result import Population
from distaff.tune.population.training import PopulationRun, check_plan, check_trainer

_FORMS = ("auto", "stacked", "in turn")


def multi_seed(
    trainer: TrainerModule,
    train_loader: Any,
    val_loader: Any = None,
    test_loader: Any = None,
    *,
    seeds: int | Sequence[int] = 5,
    num_epochs: int | str,
    form: str = "auto",
) -> Population:
    """Trains one trainer with several seeds at once, and returns statistics of its metrics.

    Each member is trained as `trainer.variant(seed=s)` would be alone, from its own initial
    weights and with its own random numbers. Batches are read once, and all members get the same:
    arrays are shuffled by the seed of the trainer itself. Programs are compiled once for all.

    A member whose loss becomes NaN or infinite ends there, and is reported; the others are not
    affected. `EarlyStopping` ends each member by itself. The trainer does not change, and nothing
    is written: the members have no run directory, loggers or other callbacks.

    Args:
        trainer: a trainer; its weights are not used.
        train_loader: as for `train_model`. Afterwards it is where one run leaves it.
        val_loader: as for `train_model`.
        test_loader: as for `train_model`.
        seeds: number of seeds, counted from the seed of the trainer; or the seeds themselves.
        num_epochs: as for `train_model`.
        form: `"stacked"` trains all members in one program, whose results may differ from
            a run alone by float32 rounding. `"in turn"` runs the program of one run for each
            member, bit for bit. `"auto"` chooses `"stacked"`, except on a CPU with convolutions,
            which are slower there when they are stacked.

    Returns:
        The members, their statistics, and a table.

    Raises:
        ConfigError: an argument is invalid, or a population does not support an option.
        DistaffError: another input is invalid (the subclass says which).
    """
    check_trainer(trainer, "multi_seed")
    if form not in _FORMS:
        raise ConfigError(f"form must be one of {', '.join(map(repr, _FORMS))}; got {form!r}.")
    found = as_seeds(seeds, trainer.config.seed)
    check_one_process()
    plan = make_plan(
        train_loader,
        val_loader,
        num_epochs=num_epochs,
        steps_per_epoch=None,
        options=trainer.config,
        seed=trainer.config.seed,
    )
    check_plan(plan, "multi_seed")
    inputs = Inputs(plan, (train_loader, val_loader, test_loader), trainer.config)
    display = make_display(trainer.config.enable_progress_bar)
    with closing_made(*inputs.made):
        prepared = prepared_run(trainer, plan, inputs.test_loader)
        chosen = None if form == "auto" else form
        run = PopulationRun(prepared, found, trainer.callbacks, chosen)
        members = run.train(inputs.test_loader, display.print)
    return Population(
        members=members,
        monitor=prepared.trainer.monitor,
        form=run.form,
        _trainer=trainer,
        _batch=prepared.workspace.example_batch,
    )


def as_seeds(seeds: int | Sequence[int], first: int) -> list[int]:
    """Returns different seeds.

    Args:
        seeds: their number, or the seeds themselves.
        first: the first of a number of seeds.

    Raises:
        ConfigError: there are no seeds, one is not an integer, or two are equal.
    """
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        return list(range(first, first + whole("seeds", seeds)))
    found = list(seeds) if isinstance(seeds, Sequence) and not isinstance(seeds, str) else []
    is_whole = all(isinstance(each, int) and not isinstance(each, bool) for each in found)
    if not found or not is_whole or len(set(found)) < len(found):
        raise ConfigError(
            "seeds must be a number of seeds, or one or more different integers such as "
            f"[0, 1, 2]; got {seeds!r}."
        )
    return found

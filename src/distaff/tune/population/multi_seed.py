"""Trains one trainer with several seeds, and with several settings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from distaff.core.config.checks import whole
from distaff.data import closing_made
from distaff.errors import ConfigError
from distaff.execution.processes import check_one_process
from distaff.run.display import make_display
from distaff.run.events import Plan, make_plan
from distaff.trainer.module import TrainerModule
from distaff.trainer.training import Inputs
from distaff.trainer.trials import PreparedRun, prepared_run
from distaff.tune.population.checks import check_plan, check_trainer
from distaff.tune.population.directory import PopulationDirectory, recording_of
from distaff.tune.population.member import TrainedMember
from distaff.tune.population.result import Population
from distaff.tune.population.settings import Setting, grouped, make_settings, traced_paths
from distaff.tune.population.traceable import untraceable
from distaff.tune.population.training import BetweenEpochs, PopulationRun
from distaff.tune.population.varied import TracedValues

_log = logging.getLogger("distaff")

MakeBetween: TypeAlias = Callable[[PopulationRun, Plan], BetweenEpochs]

_FORMS = ("auto", "stacked", "in turn", "measured")


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
    affected. `EarlyStopping` ends each member by itself. The trainer does not change.

    The population has a directory, `<root>/<name>/population/0001`, in which each member is a run
    directory. The same call resumes it if it was interrupted, and loads its result if it has
    finished. With `root=None`, nothing is written. Loggers and other callbacks are not called.

    Args:
        trainer: a trainer; its weights are not used.
        train_loader: as for `train_model`. Afterwards it is where one run leaves it.
        val_loader: as for `train_model`.
        test_loader: as for `train_model`.
        seeds: number of seeds, counted from the seed of the trainer; or the seeds themselves.
        num_epochs: as for `train_model`.
        form: `"stacked"` trains all members in one program, whose results may differ from
            a run alone by float32 rounding. `"in turn"` runs the program of one run for each
            member, bit for bit. `"auto"` chooses `"stacked"`, except on a CPU with convolutions
            or fewer than 16 members, which are slower there when they are stacked. `"measured"`
            compiles both, times a few steps of each, and remembers the faster one on this machine.

    Returns:
        The members, their statistics, and a table.

    Raises:
        ConfigError: an argument is invalid, or a population does not support an option.
        DistaffError: another input is invalid (the subclass says which).
    """
    check_trainer(trainer, "multi_seed")
    found = as_seeds(seeds, trainer.config.seed)
    settings = [Setting(seed, {}, trainer) for seed in found]
    loaders = train_loader, val_loader, test_loader
    return trained_population("multi_seed", trainer, settings, loaders, num_epochs, form)


def train_population(
    trainer: TrainerModule,
    train_loader: Any,
    val_loader: Any = None,
    test_loader: Any = None,
    *,
    vary: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]],
    seeds: int | Sequence[int] = 1,
    num_epochs: int | str,
    form: str = "auto",
) -> Population:
    """Trains one trainer with several settings, and several seeds of each; see `multi_seed`.

    Members that differ only in their seeds and in numbers that are arguments of the step share
    their programs: learning rate, weight decay, clipping and numeric options of the optimizer; the
    label smoothing and the weights of a task's loss; the dropout rate of a zoo model; and fields of
    your own that you mark with `tune.traced`. Other values are static: members are grouped by them,
    and the groups are trained one after the other.

    Args:
        trainer: as for `multi_seed`.
        train_loader: as for `train_model`. Each group reads the same batches.
        val_loader: as for `train_model`.
        test_loader: as for `train_model`.
        vary: lists of values by path, all of whose combinations are trained; or a list of settings,
            each a dict of values by path. A path is an option such as `"label_smoothing"`,
            `"optimizer.<field>"` for a field of the trainer's `OptimizerConfig`,
            `"optimizer.options.<name>"`, or `"model.<field>"` for a field of a Flax Linen module.
        seeds: as for `multi_seed`; one by default.
        num_epochs: as for `train_model`.
        form: as for `multi_seed`. With traced numbers, also `"in turn"` may differ from a run
            alone by float32 rounding.

    Returns:
        The members, in the order of the combinations and, within each, of the seeds.

    Raises:
        ConfigError: a path is unknown, or a value or another argument is invalid.
        DistaffError: another input is invalid (the subclass says which).
    """
    check_trainer(trainer, "train_population")
    found = as_seeds(seeds, trainer.config.seed)
    settings = make_settings(trainer, vary, found)
    loaders = train_loader, val_loader, test_loader
    return trained_population("train_population", trainer, settings, loaders, num_epochs, form)


def trained_population(
    owner: str,
    trainer: TrainerModule,
    settings: Sequence[Setting],
    loaders: tuple[Any, Any, Any],
    num_epochs: int | str,
    form: str,
    between: MakeBetween | None = None,
) -> Population:
    """Trains the members, group by group.

    Args:
        owner: the function that was called, for errors.
        trainer: the trainer from which they differ.
        settings: the members.
        loaders: the data of training, validation and test.
        num_epochs: as for `train_model`.
        form: as for `multi_seed`.
        between: makes what happens between two epochs; None for nothing.

    Raises:
        DistaffError: an input is invalid (the subclass says which).
    """
    if form not in _FORMS:
        raise ConfigError(f"form must be one of {', '.join(map(repr, _FORMS))}; got {form!r}.")
    if form == "measured" and trainer.config.deterministic:
        raise ConfigError(
            "form='measured' and deterministic=True contradict each other: a choice by the clock "
            "may round differently next time. Pass form='auto', 'stacked' or 'in turn'."
        )
    check_one_process(owner)
    for each in grouped(settings):
        check_trainer(settings[each.indices[0]].trainer, owner)
    display = make_display(trainer.config.enable_progress_bar)

    def show(line: str) -> None:
        _log.info("%s", line)
        display.print(line)

    job = _Job(owner, loaders, num_epochs, form, show, between)
    members, records, forms, prepared = {}, {}, [], None
    for group in _trained_groups(job, settings):
        members.update(zip(group.indices, group.members, strict=True))
        records.update(dict.fromkeys(group.indices, group.record))
        forms.append(group.run.form)
        prepared = group.prepared
    assert prepared is not None
    return Population(
        members=tuple(members[index] for index in range(len(settings))),
        monitor=prepared.trainer.monitor,
        form=", ".join(dict.fromkeys(forms)),
        _settings=tuple(settings),
        _records=tuple(records[index] for index in range(len(settings))),
        _batch=prepared.workspace.example_batch,
    )


def _trained_groups(job: _Job, settings: Sequence[Setting]) -> Iterator[_Trained]:
    """Trains the members group by group.

    A group is divided by values that turn out not to be traceable.
    """
    loader, static = job.loaders[0], {}
    position = loader.get_state() if hasattr(loader, "get_state") else None
    waiting, done, is_used = grouped(settings), 0, False
    while waiting:
        group = waiting.pop(0)
        own = [settings[index] for index in group.indices]
        if is_used and position is not None:
            loader.set_state(position)
        num_groups, is_used = done + 1 + len(waiting), True
        values = f": {group.values}" if group.values else ""
        title = f"group {done + 1} of {num_groups}{values} ({len(own)} members)"
        trained = job.train(own, group.indices, static, title if num_groups > 1 else "")
        if isinstance(trained, _Trained):
            done += 1
            yield trained
            continue
        static.update(trained)
        for path, reason in trained.items():
            job.show(f"{path} is static, and its values form groups: {reason}")
        parts = grouped(own, static)
        waiting[:0] = [x._replace(indices=[group.indices[n] for n in x.indices]) for x in parts]


class _Trained(NamedTuple):
    """A group after its training.

    Attributes:
        prepared: the prepared run of its first member.
        run: the training.
        indices: the indices of its members among all members.
        members: its members.
        record: the record of its directory.
    """

    prepared: PreparedRun
    run: PopulationRun
    indices: Sequence[int]
    members: tuple[TrainedMember, ...]
    record: Mapping[str, Any]


class _Job(NamedTuple):
    """How the members of a group are trained.

    Attributes:
        owner: the function that was called, for errors.
        loaders: the data of training, validation and test.
        num_epochs: the length of the training.
        form: the form of the members, or "auto".
        show: shows a line.
        between: makes what happens between two epochs; None for nothing.
    """

    owner: str
    loaders: tuple[Any, Any, Any]
    num_epochs: int | str
    form: str
    show: Callable[[str], None]
    between: MakeBetween | None

    def train(
        self,
        settings: Sequence[Setting],
        indices: Sequence[int],
        static: Collection[str],
        title: str,
    ) -> _Trained | dict[str, str]:
        """Trains the members of a group.

        Args:
            settings: the members.
            indices: their indices among all members.
            static: paths whose values cannot be traced.
            title: a line on the group, which is shown before; may be empty.

        Returns:
            The group; or, before any training, values that must be static, with reasons by path.
        """
        trainer, loaders = settings[0].trainer, self.loaders
        plan = make_plan(
            *loaders[:2],
            num_epochs=self.num_epochs,
            steps_per_epoch=None,
            options=trainer.config,
            seed=trainer.config.seed,
        )
        check_plan(plan, self.owner)
        inputs = Inputs(plan, loaders, trainer.config)
        with closing_made(*inputs.made):
            prepared = prepared_run(trainer, plan, inputs.test_loader, recording_of(trainer))
            paths = traced_paths(settings, static)
            reasons = untraceable(prepared, settings, paths)
            if reasons:
                return reasons
            run = PopulationRun(prepared, settings, self.form, TracedValues(prepared, paths))
            facts: dict[str, Any] = {"num_epochs": plan.length}
            if self.between is not None:
                run.between = self.between(run, plan)
                facts["between"] = run.between.record()
            for line in (title, run.remark):
                if line:
                    self.show(line)
            directory = PopulationDirectory(prepared, run, settings, indices, facts)
            with directory.opened(self.show):
                run.train(self.show, directory.save)
                found = directory.write(run.tested(inputs.test_loader))
            return _Trained(prepared, run, indices, found, directory.record)


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

"""The result of a population: its members, their statistics, and a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distaff.core.typing import Batch
from distaff.core.views import html
from distaff.core.views.brief import brief
from distaff.errors import ConfigError, MetricError, StateError, nearest
from distaff.metrics.monitor import Monitor, direction
from distaff.trainer.module import TrainerModule
from distaff.trainer.trials import with_state
from distaff.tune.population.member import TrainedMember
from distaff.tune.population.member_files import extracted
from distaff.tune.population.settings import Setting

_RESAMPLES = 10_000
_FEWEST = 2
_POWER = 7.85
"""`(1.960 + 0.842) ** 2`: the quantiles of 97.5 % and 80 % of a normal distribution."""


class Spread(NamedTuple):
    """The values of a metric over the members of a population.

    Attributes:
        mean: their mean.
        deviation: their standard deviation, with `n - 1`; NaN for fewer than two values.
        low: lower end of the 95 % interval of the mean, by bootstrap; NaN for fewer than two.
        high: its upper end.
        count: number of values.
    """

    mean: float
    deviation: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        """Returns text such as `0.912 ± 0.004 [0.909, 0.915] (5)`."""
        if self.count < _FEWEST:
            return f"{self.mean:.4g} ({self.count})"
        interval = f"[{self.low:.4g}, {self.high:.4g}]"
        return f"{self.mean:.4g} ± {self.deviation:.2g} {interval} ({self.count})"


class PairedDifference(NamedTuple):
    """How much a metric differs between two settings that were trained with the same seeds.

    Attributes:
        spread: the differences, seed by seed: the first setting minus the second.
        seeds_needed: about the number of seeds with which a test would find a difference of this
            size in four of five experiments (two-sided, 5 %); None if the mean is 0 or unknown.
    """

    spread: Spread
    seeds_needed: int | None

    def __str__(self) -> str:
        needed = "" if self.seeds_needed is None else f"; {self.seeds_needed} seeds needed"
        return f"{self.spread}{needed}"


def spread(values: Any) -> Spread:
    """Returns the mean of values, their deviation, and a bootstrap interval of the mean.

    The same values always give the same interval: 10,000 samples with a fixed seed, percentiles
    2.5 and 97.5 (Efron 1979). With fewer than about ten values the interval is too narrow.

    Args:
        values: numbers `[n]`.
    """
    x = np.asarray(values, np.float64)
    if len(x) < _FEWEST:
        return Spread(float(x[0]) if len(x) else np.nan, np.nan, np.nan, np.nan, len(x))
    rows = np.random.default_rng(0).integers(len(x), size=(_RESAMPLES, len(x)))
    low, high = np.percentile(x[rows].mean(axis=1), [2.5, 97.5])
    return Spread(float(x.mean()), float(x.std(ddof=1)), float(low), float(high), len(x))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Population:
    """The trained members of a population.

    Attributes:
        members: the members, in the order of their seeds.
        monitor: the metric that ranks them.
        form: `"stacked"`, one program for all members; or `"in turn"`, the program of one member
            for each of them.
    """

    members: tuple[TrainedMember, ...]
    monitor: Monitor
    form: str
    _settings: tuple[Setting, ...]
    _records: tuple[Mapping[str, Any], ...]
    _batch: Batch

    @property
    def best(self) -> TrainedMember:
        """The best member by `monitor`, among those that did not diverge.

        Raises:
            StateError: all diverged.
            MetricError: no member has the metric, as without a validation.
        """
        alive = self._alive()
        if not alive:
            raise StateError("All members diverged. Lower the learning rate, or clip gradients.")
        return self._ranked(self.monitor.name, alive)[0]

    def member(self, index: int) -> TrainerModule:
        """Returns a trainer that has the best state of a member: ready to predict and evaluate.

        It writes nothing. To train it further in a run of its own, pass its weights to your
        trainer: `trainer.variant(init_from=member.state.params)`.

        Args:
            index: its index in `members`.

        Raises:
            ConfigError: there is no such member.
        """
        each = self._at(index, "member")
        epoch = each.epoch if each.best is None else each.best.epoch
        trainer = self._settings[index].trainer
        return with_state(trainer, each.state, epoch=epoch, seed=each.seed, batch=self._batch)

    def extract(self, index: int, root: str | Path | None = None) -> Path:
        """Writes a member as a run of its own, `<root>/<name>/0001`, and returns its directory.

        Members of a population with a directory have been written there already: see `path` of a
        member. The copy is complete without it.

        Args:
            index: its index in `members`.
            root: the folder of all runs; None for the trainer's own.

        Raises:
            ConfigError: there is no such member, or neither a root.
            RunDirectoryError: the directory cannot be written.
        """
        each, setting = self._at(index, "extract"), self._settings[index]
        root = setting.trainer.config.root if root is None else root
        if root is None:
            raise ConfigError("extract writes a run, and the trainer has root=None. Pass root=.")
        return extracted(each, setting, self._records[index], root)

    def _at(self, index: int, owner: str) -> TrainedMember:
        """Returns a member.

        Raises:
            ConfigError: there is no such member.
        """
        if not isinstance(index, int) or not -len(self.members) <= index < len(self.members):
            raise ConfigError(
                f"{owner} takes an index below {len(self.members)}; got {index!r}. The seeds are "
                f"{[each.seed for each in self.members]}."
            )
        return self.members[index]

    def summary(self, settings: Mapping[str, Any] | None = None) -> dict[str, Spread]:
        """Returns mean, deviation and interval of each scalar metric, without diverged members.

        Args:
            settings: values by path, such as `{"optimizer.learning_rate": 1e-3}`: only the members
                with these values. None for all members.

        Raises:
            ConfigError: no member has these values.
        """
        wanted = {} if settings is None else dict(settings)
        alive = [each for each in self._alive() if wanted.items() <= each.settings.items()]
        if wanted and not any(wanted.items() <= each.settings.items() for each in self.members):
            raise ConfigError(f"No member has the settings {wanted!r}.")
        return {name: spread(self._values(name, alive)) for name in self._names(alive)}

    def difference(
        self, settings: Mapping[str, Any], other: Mapping[str, Any], name: str | None = None
    ) -> PairedDifference:
        """Compares two settings over the same seeds.

        Seeds of which a member diverged are left out. The number of seeds is that of a paired
        z-test, and too small if it is below about ten (Colas et al. 2018, arXiv:1806.08295).

        Args:
            settings: values by path, such as `{"optimizer.learning_rate": 1e-3}`; together with
                the seed they must name one member.
            other: the values to compare with.
            name: the metric; by default the monitored one.

        Raises:
            ConfigError: a setting names no member, or several of one seed.
            MetricError: no member has the metric.
        """
        name = self.monitor.name if name is None else name
        first, second = (self._by_seed(each, name) for each in (settings, other))
        if not first.keys() & second.keys():
            raise ConfigError(f"No seed has {name!r} with both {settings!r} and {other!r}.")
        found = spread([first[seed] - second[seed] for seed in first if seed in second])
        if not found.mean or not found.deviation >= 0:
            return PairedDifference(found, None)
        needed = int(np.ceil(_POWER * (found.deviation / found.mean) ** 2))
        return PairedDifference(found, max(needed, _FEWEST))

    def _by_seed(self, settings: Mapping[str, Any], name: str) -> dict[int, float]:
        """Returns the values of a metric by seed."""
        wanted = dict(settings).items()
        members = [each for each in self.members if wanted <= each.settings.items()]
        seeds = [each.seed for each in members]
        if not members or len(set(seeds)) < len(seeds):
            has = "no member" if not members else "several members of one seed"
            raise ConfigError(f"The settings {dict(settings)!r} name {has}. Name one per seed.")
        alive = self._ranked(name, [each for each in members if each.status != "diverged"])
        return {each.seed: float(each.metrics[name]) for each in alive if name in each.metrics}

    def table(self, by: str | None = None) -> str:
        """Returns the members and their metrics as text, the best first.

        Args:
            by: the metric to sort by; by default the monitored one.

        Raises:
            MetricError: no member has this metric.
        """
        head, rows = self._cells(by)
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = (
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in (head, *rows)
        )
        facts = [f"{name}  {each}" for name, each in self._facts()]
        ended = [f"{_name(each)}: {each.reason}" for each in self.members if each.reason]
        return "\n".join([*lines, "", *facts, *ended]).rstrip()

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        found = None if self.members[0].settings else self.summary().get(self.monitor.name)
        value = "" if found is None else f"{self.monitor.name} {found}"
        return brief(self, f"{len(self.members)} members", self.form, value)

    def _repr_html_(self) -> str:
        head, rows = self._cells(None)
        facts = [[name, str(each)] for name, each in self._facts()]
        ended = [f"{_name(each)}: {each.reason}" for each in self.members if each.reason]
        note = html.preformatted("\n".join(ended)) if ended else ""
        return f"{html.table(head, rows)}{html.table(['', ''], facts)}{note}"

    def _facts(self) -> list[tuple[str, Spread]]:
        """Returns what to show below the table: the spread over the seeds of each setting."""
        if not self.members[0].settings:
            return list(self.summary().items())
        found = {_label(each): each.settings for each in self.members}
        spreads = {label: self.summary(x).get(self.monitor.name) for label, x in found.items()}
        return [(n, x) for n, x in spreads.items() if x is not None and x.count >= _FEWEST]

    def _alive(self) -> list[TrainedMember]:
        return [each for each in self.members if each.status != "diverged"]

    def _cells(self, by: str | None) -> tuple[list[str], list[list[str]]]:
        names = self._names(self.members)
        settings = list(dict.fromkeys(name for each in self.members for name in each.settings))
        sort = self.monitor.name if by is None else by
        is_known = by is not None or any(sort in each.metrics for each in self.members)
        members = self._ranked(sort, self.members) if is_known else list(self.members)
        has_status = any(each.status != "finished" for each in self.members)
        head = ["seed", *settings, *["status"] * has_status, *names]
        rows = [
            [
                str(each.seed),
                *(_text(each.settings.get(name)) for name in settings),
                *[each.status] * has_status,
                *(_text(each.metrics.get(name)) for name in names),
            ]
            for each in members
        ]
        return head, rows

    def _names(self, members: Any) -> list[str]:
        """Returns the names of the scalar metrics of members, except `train/`."""
        found: Mapping[str, Any] = {n: x for each in members for n, x in each.metrics.items()}
        scalars = [name for name, value in found.items() if np.ndim(value) == 0]
        return [name for name in scalars if not name.startswith("train/")] or scalars

    def _values(self, name: str, members: Any) -> list[float]:
        return [float(each.metrics[name]) for each in members if name in each.metrics]

    def _ranked(self, name: str, members: Any) -> list[TrainedMember]:
        """Returns members sorted by a metric; those that diverged or do not have it are last."""
        known = {n for each in members for n in each.metrics}
        if name not in known:
            raise MetricError(f"No member has the metric {name!r}. {nearest(name, known)}")
        mode = self.monitor.mode if name == self.monitor.name else direction(name) or "min"
        sign = 1 if mode == "min" else -1

        def key(each: TrainedMember) -> tuple[bool, bool, float]:
            value = float(each.metrics.get(name, np.nan))
            return each.status == "diverged", bool(np.isnan(value)), sign * np.nan_to_num(value)

        return sorted(members, key=key)


def _name(each: TrainedMember) -> str:
    return ", ".join(filter(None, [f"seed {each.seed}", _label(each)]))


def _label(each: TrainedMember) -> str:
    """Returns the settings of a member as text."""
    return ", ".join(f"{name}={value!r}" for name, value in each.settings.items())


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)

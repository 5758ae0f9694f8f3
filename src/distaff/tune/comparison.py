"""The result of a comparison of optimizers, as curves and as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A number measured in several runs.

    Attributes:
        mean: mean over the runs that have it; NaN if none has.
        standard_error: standard error of the mean between runs; NaN for fewer than two.
        count: number of runs that have it.
        total: number of all runs.
    """

    mean: float
    standard_error: float
    count: int
    total: int

    def __str__(self) -> str:
        """Returns text such as `0.0123 ± 0.0004 (3/5)`, without the count if it is complete."""
        if not self.count:
            return "-"
        # An error below the last digit of the mean is shown as 0.
        shown = 0 if self.standard_error < 1e-4 * abs(self.mean) else self.standard_error
        error = "" if np.isnan(shown) else f" ± {shown:.2g}"
        share = "" if self.count == self.total else f" ({self.count}/{self.total})"
        return f"{self.mean:.4g}{error}{share}"


class Curve(NamedTuple):
    """A quantity by optimizer step, over several runs.

    Attributes:
        steps: completed optimizer updates, int `[points]`.
        mean: mean over the runs, `[points]`; NaN after the first run has ended.
        standard_error: standard error of the mean, `[points]`; NaN for a single run.
    """

    steps: np.ndarray
    mean: np.ndarray
    standard_error: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerRun:
    """One training run of one optimizer.

    Attributes:
        seed: seed of the model and of the data order.
        learning_rate: the learning rate; None for an optimizer without one.
        losses: training loss per step, float64 `[steps]`; not finite after divergence.
        cosines: cosine of update and negative gradient per step, float64 `[steps]`.
        seconds: duration per step, float64 `[steps]`, from requesting the batch until the loss is
            known. Steps in which JAX compiled have the median of the others.
        steps_per_epoch: steps per epoch, the window for averaging losses and cosines.
        metrics: metrics of the best validation (`val/`) and of the test (`test/`), by name.
        diverged: whether the loss or a parameter became NaN or infinite.
        path: the run directory; None if nothing was written.
    """

    seed: int
    learning_rate: float | None
    losses: np.ndarray
    cosines: np.ndarray
    seconds: np.ndarray
    steps_per_epoch: int
    metrics: Mapping[str, float]
    diverged: bool = False
    path: Path | None = None

    def averaged(self, name: Literal["losses", "cosines"]) -> np.ndarray:
        """Returns the mean over the last `steps_per_epoch` steps, at each step.

        Returns:
            An array `[steps]`; NaN in the first epoch, and if a value is not finite.
        """
        values = getattr(self, name)
        values = np.where(np.isfinite(values), values, np.nan)
        averaged = np.full(len(values), np.nan)
        width = self.steps_per_epoch
        if len(values) >= width:
            windows = np.lib.stride_tricks.sliding_window_view(values, width)
            averaged[width - 1 :] = windows.mean(axis=-1)
        return averaged

    def steps_to(self, target: float) -> int | None:
        """Returns the first step whose averaged loss is at most `target`, or None.

        A run that diverges later still counts.
        """
        reached = np.flatnonzero(self.averaged("losses") <= target)
        return int(reached[0]) + 1 if len(reached) else None

    def numbers(self, target: float) -> dict[str, float]:
        """Returns the numbers of a table row; NaN for those that this run does not have."""
        steps = self.steps_to(target)
        averaged = self.averaged("losses")
        return {
            "final_loss": np.nan if self.diverged or not len(averaged) else float(averaged[-1]),
            "mean_loss": np.nan if self.diverged else float(self.losses.mean()),
            "steps": np.nan if steps is None else steps,
            "seconds": np.nan if steps is None else float(self.seconds[:steps].sum()),
            "seconds_per_step": float(self.seconds.mean()) if len(self.seconds) else np.nan,
            "cosine": np.nan if self.diverged else float(self.cosines.mean()),
            **({} if self.diverged else self.metrics),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerResult:
    """The result of one optimizer.

    Attributes:
        learning_rate: the rate with the best validation; NaN if all rates diverged, None for an
            optimizer without a learning rate.
        grid: value of the validation metric per learning rate; NaN if it diverged. Empty for a grid
            of one rate.
        runs: one run per seed with the chosen rate; empty if all rates diverged.
    """

    learning_rate: float | None
    grid: Mapping[float | None, float]
    runs: tuple[OptimizerRun, ...]

    @property
    def shown_rate(self) -> str:
        """The learning rate as text; with an asterisk, `0.1*`, at an edge of the grid."""
        if self.learning_rate is None:
            return "-"
        if np.isnan(self.learning_rate):
            return "diverged"
        return f"{self.learning_rate:g}" + "*" * (self.edge is not None)

    @property
    def edge(self) -> Literal["lowest", "highest"] | None:
        """The edge of the grid at which the chosen rate lies; None if inside."""
        rates = [rate for rate in self.grid if rate is not None]
        if len(rates) < 2 or self.learning_rate not in rates:
            return None
        if self.learning_rate == min(rates):
            return "lowest"
        return "highest" if self.learning_rate == max(rates) else None

    def curve(self, name: Literal["losses", "cosines"]) -> Curve:
        """Returns a quantity by step, averaged over the last epoch and the runs."""
        curves = [run.averaged(name) for run in self.runs]
        length = max(map(len, curves), default=0)
        padded = np.full((len(curves), length), np.nan)
        for row, curve in zip(padded, curves, strict=True):
            row[: len(curve)] = curve
        if not len(curves):
            return Curve(np.arange(0), np.empty(0), np.empty(0))
        error = np.full(length, np.nan)
        if len(curves) > 1:
            error = padded.std(axis=0, ddof=1) / np.sqrt(len(curves))
        return Curve(np.arange(1, length + 1), padded.mean(axis=0), error)

    def estimates(self, target: float) -> dict[str, Estimate]:
        """Returns the numbers of the table by name."""
        rows = [run.numbers(target) for run in self.runs]
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: _estimate([row.get(name, np.nan) for row in rows]) for name in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several optimizers on one task, each with its best learning rate.

    Attributes:
        results: results by the optimizer's name.
        target: the training loss to reach.
    """

    results: Mapping[str, OptimizerResult]
    target: float

    def curves(self, name: Literal["losses", "cosines"]) -> dict[str, Curve]:
        """Returns the curves by optimizer, without those that always diverged."""
        curves = {label: result.curve(name) for label, result in self.results.items()}
        return {label: curve for label, curve in curves.items() if len(curve.steps)}

    def rows(self) -> dict[str, dict[str, Estimate]]:
        """Returns the measurements by optimizer.

        Returns:
            `final_loss`, the training loss over the last epoch; `mean_loss` over all steps; `steps`
            and `seconds` until the averaged loss is at most `target`; `seconds_per_step`; `cosine`
            of update and negative gradient; and the metrics of the best validation (`val/...`) and
            of the test (`test/...`). A run that diverged has only `steps` and `seconds`, if it
            reached the target before.
        """
        return {name: result.estimates(self.target) for name, result in self.results.items()}

    def table(self) -> str:
        """Returns the rows as text: mean ± standard error over the seeds.

        Losses of validation and test are omitted if there are other metrics. A count such as
        `(3/5)` is the number of runs in a mean, if not all. A rate at the edge of its grid has an
        asterisk, explained below the table.
        """
        rows = self.rows()
        measured = list(dict.fromkeys(name for row in rows.values() for name in row))
        metrics = [name for name in measured if name.startswith(("val/", "test/"))]
        metrics = [name for name in metrics if not name.endswith("/loss")] or metrics
        titles = {
            "final_loss": "final loss",
            "mean_loss": "mean loss",
            **{name: name for name in metrics},
            "steps": f"steps to {self.target:g}",
            "seconds": "seconds",
            "cosine": "cosine",
        }
        lines = [["optimizer", "rate", *titles.values()]]
        for name, row in rows.items():
            shown = [str(row[title]) if title in row else "-" for title in titles]
            lines.append([name, self.results[name].shown_rate, *shown])
        return "\n".join([_aligned(lines), *self._remarks()])

    def _remarks(self) -> list[str]:
        edges = {name: result.edge for name, result in self.results.items()}
        at_edge = [f"{name} ({edge})" for name, edge in edges.items() if edge is not None]
        if not at_edge:
            return []
        return [
            f"* at the edge of its grid: {', '.join(at_edge)}. A better rate may lie beyond it; "
            "widen the grid."
        ]


def _estimate(values: Iterable[float]) -> Estimate:
    values = np.array(list(values), float)
    known = values[np.isfinite(values)]
    count = len(known)
    mean = float(known.mean()) if count else np.nan
    error = float(known.std(ddof=1) / np.sqrt(count)) if count > 1 else np.nan
    return Estimate(mean, error, count, len(values))


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )

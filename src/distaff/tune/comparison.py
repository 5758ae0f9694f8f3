"""Comparison: what the runs of several optimizers on one task showed, as curves and as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A number measured in several runs.

    Attributes:
        mean: over the runs that have it; NaN where none has.
        standard_error: of the mean, from the spread between runs; NaN for fewer than two.
        count: runs that have it.
        total: all runs.
    """

    mean: float
    standard_error: float
    count: int
    total: int

    def __str__(self) -> str:
        """Returns such as `0.0123 ± 0.0004 (3/5)`; the count is left out where all runs have it."""
        if not self.count:
            return "-"
        # An error below the last digit that is shown of the mean is none to the reader.
        shown = 0 if self.standard_error < 1e-4 * abs(self.mean) else self.standard_error
        error = "" if np.isnan(shown) else f" ± {shown:.2g}"
        share = "" if self.count == self.total else f" ({self.count}/{self.total})"
        return f"{self.mean:.4g}{error}{share}"


class Curve(NamedTuple):
    """A quantity by optimizer step, over several runs.

    Attributes:
        steps: completed optimizer updates, int `[points]`.
        mean: over the runs, `[points]`; NaN from where the first run has ended.
        standard_error: of the mean, `[points]`; NaN for a single run.
    """

    steps: np.ndarray
    mean: np.ndarray
    standard_error: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerRun:
    """One training by one optimizer.

    Attributes:
        seed: of the model and of the order of the data.
        learning_rate: it was trained with; None where the optimizer has none.
        losses: the training loss of each step, float64 `[steps]`; not finite where it diverged.
        cosines: of update and negative gradient at each step, float64 `[steps]`.
        seconds: each step took, float64 `[steps]`, from asking for its batch until its loss is
            known. A step in which JAX compiled counts as the median of the others.
        steps_per_epoch: steps that see each example once; losses and cosines are averaged over so
            many.
        metrics: numbers of the best validation (`val/`) and of the test (`test/`), by name.
        diverged: whether the loss or a parameter became NaN or infinite.
        path: the run directory; None where nothing was written.
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
        """Returns at each step the mean over the last `steps_per_epoch` steps.

        Of a loss that is the training loss over every example once, each as it was seen.

        Returns:
            `[steps]`; NaN before the first epoch is over, and where a value is not finite.
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
        """Returns after how many steps the averaged loss was first at most `target`, or None.

        A run that diverges afterwards has reached it all the same.
        """
        reached = np.flatnonzero(self.averaged("losses") <= target)
        return int(reached[0]) + 1 if len(reached) else None

    def numbers(self, target: float) -> dict[str, float]:
        """Returns what a row of the table is made of; NaN for what this run does not have."""
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
    """What one optimizer showed.

    Attributes:
        learning_rate: the one of the grid that was best on validation data; NaN where the loss
            became NaN with all of them, None where the optimizer has none.
        grid: the validation metric that each learning rate came to; NaN where it diverged. Empty
            where the grid has one rate, so that there is nothing to choose.
        runs: one for each seed, with the chosen rate; none where all rates diverged.
    """

    learning_rate: float | None
    grid: Mapping[float | None, float]
    runs: tuple[OptimizerRun, ...]

    @property
    def shown_rate(self) -> str:
        """The learning rate as a table or a legend shows it; `0.1*` at an edge of the grid."""
        if self.learning_rate is None:
            return "-"
        if np.isnan(self.learning_rate):
            return "diverged"
        return f"{self.learning_rate:g}" + "*" * (self.edge is not None)

    @property
    def edge(self) -> Literal["lowest", "highest"] | None:
        """Which end of the grid the chosen rate is at, beyond which a better one may lie."""
        rates = [rate for rate in self.grid if rate is not None]
        if len(rates) < 2 or self.learning_rate not in rates:
            return None
        if self.learning_rate == min(rates):
            return "lowest"
        return "highest" if self.learning_rate == max(rates) else None

    def curve(self, name: Literal["losses", "cosines"]) -> Curve:
        """Returns how a quantity, averaged over the last epoch, went with the steps."""
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
        """Returns the numbers of the table, by name."""
        rows = [run.numbers(target) for run in self.runs]
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: _estimate([row.get(name, np.nan) for row in rows]) for name in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several optimizers on one task, each with its best learning rate of a grid.

    Attributes:
        results: by the optimizer's name.
        target: the training loss whose first reach is timed.
    """

    results: Mapping[str, OptimizerResult]
    target: float

    def curves(self, name: Literal["losses", "cosines"]) -> dict[str, Curve]:
        """Returns the curve of each optimizer that has one."""
        curves = {label: result.curve(name) for label, result in self.results.items()}
        return {label: curve for label, curve in curves.items() if len(curve.steps)}

    def rows(self) -> dict[str, dict[str, Estimate]]:
        """Returns by optimizer what was measured.

        Returns:
            `final_loss`: of training, over the last epoch; `mean_loss` over all steps; `steps` and
            `seconds` until the loss, averaged over an epoch, is at most `target`;
            `seconds_per_step`; `cosine` of update and negative gradient, over all steps; and the
            metrics of the best validation (`val/...`) and of its test (`test/...`). A run that
            diverged has only the steps, and the seconds, of a target it had reached before.
        """
        return {name: result.estimates(self.target) for name, result in self.results.items()}

    def table(self) -> str:
        """Returns the rows as text: mean ± standard error over the seeds.

        Of several metrics the validation and test losses are left out. A number such as `(3/5)`
        says how many runs a mean is of, where it is not of all. A rate at the edge of its grid has
        an asterisk, and a line below the table names it.
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

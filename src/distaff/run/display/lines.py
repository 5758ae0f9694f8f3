"""Formats numbers, epochs and metrics as text of constant width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from distaff.core.typing import Scalars

NUMBER_WIDTH = 6
_AVERAGES = ("", "_ema", "_swa")
_SPLITS = ("train", *(f"{split}{average}" for split in ("val", "test") for average in _AVERAGES))


def number(value: float) -> str:
    """Returns a number in six characters, with as many digits as fit, padded on the left.

    Beyond the range of float32 the text may be one character longer.

    >>> [number(value) for value in (0.12344, 12.345, -3.14159, 1.2e-5, 1234567.0, 7.0)]
    ['0.1234', '12.345', '-3.142', '1.2e-5', ' 1.2e6', '7.0000']
    """
    tiny = 0 < abs(value) < 1e-3
    text = ""
    for form in (".1e", ".0e") if tiny else (".4f", ".3f", ".2f", ".1f", ".0f", ".1e", ".0e"):
        text = f"{value:{form}}".replace("e+", "e").replace("e0", "e").replace("e-0", "e-")
        if len(text) <= NUMBER_WIDTH:
            break
    return text.rjust(NUMBER_WIDTH)


def metric_fields(metrics: Scalars) -> list[str]:
    """Returns one field per split: `["train loss 0.1234", "val loss 0.1402"]`."""
    splits: dict[str, list[str]] = {}
    for name, value in metrics.items():
        split, _, metric = name.rpartition("/")
        splits.setdefault(split, []).append(f"{metric} {number(value)}")
    return [" ".join([split, *texts]).lstrip() for split, texts in splits.items()]


def live_fields(metrics: Scalars) -> list[tuple[int, str]]:
    """Returns the fields of the live line, as `fit` takes them: metrics, then the learning rate.

    The first metric is never dropped. Of several learning rates, the first is shown.

    >>> live_fields({"step/loss": 0.25, "step/accuracy": 0.5, "step/learning_rate": 1e-3})
    [(0, 'loss 0.2500'), (4, 'accuracy 0.5000'), (1, 'lr 0.0010')]
    """
    names = [(name, name.partition("/")[2] or name) for name in metrics]
    rates = [name for name, short in names if short.startswith("learning_rate")]
    others = [(name, short) for name, short in names if name not in rates]
    fields = [
        (3 + place if place else 0, f"{short} {number(metrics[name])}")
        for place, (name, short) in enumerate(others)
    ]
    return [*fields, *((1, f"lr {number(metrics[name])}") for name in rates[:1])]


def epoch_text(epoch: int, num_epochs: int | None) -> str:
    """Returns the epoch, and the number of epochs if it is known.

    >>> epoch_text(3, 20), epoch_text(3, None)
    ('epoch  3/20', 'epoch 3')
    """
    return f"epoch {epoch:{len(str(num_epochs))}}/{num_epochs}" if num_epochs else f"epoch {epoch}"


class EpochLine(NamedTuple):
    """What the line of one completed epoch says.

    Attributes:
        epoch: the epoch, counted from 1.
        num_epochs: epochs of the whole run; None if unknown.
        step: optimizer updates completed.
        metrics: metrics by name: `{"train/loss": 0.31, "val/loss": 0.35}`.
        seconds: duration of the epoch.
        is_best: whether its model is the best so far; the line ends with a star.
    """

    epoch: int
    num_epochs: int | None
    step: int
    metrics: Scalars
    seconds: float
    is_best: bool

    def text(self, step_width: int, examples_per_second: float, width: int | None = None) -> str:
        """Returns the line.

        If it is wider than `width`, it drops the rate, the seconds and the step, in this order.

        >>> EpochLine(3, 20, 60, {"train/loss": 0.25, "val/loss": 0.5}, 0.82, True).text(3, 0)
        'epoch  3/20  step  60  train loss 0.2500  val loss 0.5000   0.8 s *'
        """
        fields = [
            (0, epoch_text(self.epoch, self.num_epochs)),
            (1, f"step {self.step:{step_width}}"),
            *((0, field) for field in metric_fields(self.metrics)),
            (2, f"{self.seconds:4.{1 if self.seconds < 100 else 0}f} s"),
        ]
        if examples_per_second:
            fields.append((3, f"{examples_per_second:6.0f} examples/s"))
        room = None if width is None else width - 2
        return fit(fields, width=room) + (" *" if self.is_best else "")


def fit(fields: Sequence[tuple[int, str]], *, width: int | None) -> str:
    """Joins fields with two spaces, and drops those that do not fit.

    Args:
        fields: rank and text of each field, in the order of the line. The highest rank is dropped
            first; rank 0 is never dropped, but joined with one space if necessary.
        width: available columns; None for no limit.
    """
    texts = [text for _, text in fields]
    for rank in sorted({rank for rank, _ in fields}, reverse=True):
        texts = [text for field_rank, text in fields if field_rank <= rank]
        line = "  ".join(texts)
        if width is None or len(line) <= width:
            return line
    return " ".join(texts)


def rows_by_split(metrics: Mapping[str, Any], titles: Mapping[str, str]) -> dict[str, Scalars]:
    """Returns the scalar metrics of a run by split, as `Display.table` takes them."""
    rows = {}
    for split in _SPLITS:
        found = {
            name.removeprefix(f"{split}/"): value
            for name, value in metrics.items()
            if name.startswith(f"{split}/") and np.ndim(value) == 0
        }
        if found:
            rows[titles.get(split, split)] = found
    return rows


def metrics_table(rows: Mapping[str, Scalars]) -> Table:
    """Returns a table with one column per split and one row per metric.

    Args:
        rows: metrics by split; names may include it, as in `{"test": {"test/loss": 0.35}}`.
    """
    by_split = {
        split: {name.removeprefix(f"{split}/"): value for name, value in metrics.items()}
        for split, metrics in rows.items()
    }
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    for split in by_split:
        table.add_column(split, justify="right")
    for name in dict.fromkeys(name for metrics in by_split.values() for name in metrics):
        cells = [number(metrics[name]) if name in metrics else "-" for metrics in by_split.values()]
        table.add_row(name, *cells)
    return table

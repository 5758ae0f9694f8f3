"""The display for a notebook: one output of the cell, updated in place."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

from rich.console import RenderableType

from distaff.core.typing import Scalars
from distaff.core.views import html
from distaff.loggers import svg
from distaff.run.display.lines import EpochLine, metrics_table, number
from distaff.run.display.model_table import ModelTable
from distaff.run.display.progress import Progress
from distaff.run.display.protocol import Display
from distaff.run.display.text import as_text

T = TypeVar("T")

_log = logging.getLogger("distaff")

_REFRESH_SECONDS = 0.5
_MOST_EPOCHS = 12
_MOST_LINES = 40
_MOST_PANELS = 2
_MOST_POINTS = 2000
_WIDTH = 100
_FEW_EPOCHS = 3


class Output(Protocol):
    """One output of a cell."""

    def show(self, html: str, text: str) -> None:
        """Shows the output, or replaces it."""


class NotebookDisplay(Display):
    """Shows a run in one output: a bar, a table of the last epochs, a curve, and lines of text.

    It draws twice per second at most, on the thread of the training, in about two milliseconds.

    Args:
        make_output: makes a new output of the current cell.
        clock: returns a monotonic time in seconds.
    """

    def __init__(
        self, make_output: Callable[[], Output], *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._make_output, self._clock = make_output, clock
        self._progress = Progress(clock)
        self._begin()

    def _begin(self) -> None:
        self._output: Output | None = None
        self._is_open, self._drawn_at = False, -_REFRESH_SECONDS
        self._model: tuple[str, str] | None = None
        self._lines: list[str] = []
        self._tables: list[tuple[str, str]] = []
        self._epochs: list[tuple[str, list[str], list[str]]] = []
        self._curves: dict[str, list[tuple[float, float]]] = {}
        self._step_curves: dict[str, list[tuple[float, float]]] = {}

    def start(self, num_epochs: int | None, steps_per_epoch: int | None) -> None:
        self._begin()
        self._progress.begin(num_epochs, steps_per_epoch)
        self._is_open = True

    def compiling(self, what: str) -> None:
        self._progress.compiling(what)
        self._draw()

    def running(self) -> None:
        self._progress.running()

    def advance(self, step: int, epoch: int, examples: int) -> None:
        self._progress.advance(step, epoch, examples)
        self._draw_if_due()

    def update(self, metrics: Scalars) -> None:
        self._progress.update(metrics)
        for name, value in metrics.items():
            if "learning_rate" not in name:
                _add(self._step_curves, name, (self._progress.step, value))
        self._draw_if_due()

    def epoch_line(self, line: EpochLine) -> None:
        text = line.text(self._progress.step_width(), self._progress.pace.lap())
        values = [number(value).strip() for value in line.metrics.values()]
        cells = [f"{line.epoch}", *values, f"{line.seconds:.1f} s", "*" if line.is_best else ""]
        self._epochs.append((text, ["epoch", *line.metrics, "time", ""], cells))
        del self._epochs[:-_MOST_EPOCHS]
        for name, value in line.metrics.items():
            _add(self._curves, name, (line.epoch, value))
        self._draw_if_due()

    def track(
        self, iterable: Iterable[T], description: str, total: int | None = None
    ) -> Iterator[T]:
        if self._is_open:
            batches = self._progress.track(iterable, description, total)
        else:
            batches = self._alone(iterable, description, total)
        for item in batches:
            self._draw_if_due()
            yield item

    def _alone(self, iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
        """Tracks an evaluation outside of a training; a short one shows nothing."""
        self._begin()
        began_at = self._drawn_at = self._clock()
        self._is_open = True
        try:
            yield from self._progress.track(iterable, description, total)
        finally:
            self._lines = [f"{description}: {self._clock() - began_at:.1f} s"]
            self._is_open = False
            if self._output is not None:
                self._draw()
            self._begin()

    def table(self, rows: Mapping[str, Scalars]) -> None:
        by_split = {
            split: {name.removeprefix(f"{split}/"): value for name, value in metrics.items()}
            for split, metrics in rows.items()
        }
        names = dict.fromkeys(name for metrics in by_split.values() for name in metrics)
        cells = [
            [name, *(number(m[name]).strip() if name in m else "-" for m in by_split.values())]
            for name in names
        ]
        text = as_text(metrics_table(rows), _WIDTH)
        self._tables.append((html.table(["", *by_split], cells), text))
        self._draw()

    def print(self, content: RenderableType) -> None:
        text = content if isinstance(content, str) else as_text(content, _WIDTH)
        if isinstance(content, ModelTable):
            self._model = (content.heading(), text)
        else:
            self._lines.append(text.rstrip("\n"))
            del self._lines[:-_MOST_LINES]
        self._draw()
        if not self._is_open:
            self._begin()

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._draw()
            self._begin()
            self._progress.begin(0, None)

    def _draw_if_due(self) -> None:
        if self._clock() - self._drawn_at >= _REFRESH_SECONDS:
            self._draw()

    def _draw(self) -> None:
        """Shows everything; if that fails, logs a warning and never draws again."""
        self._drawn_at = self._clock()
        page, text = self._html(), self._text()
        if not page:
            return
        try:
            if self._output is None:
                self._output = self._make_output()
            self._output.show(page, text)
        except Exception as error:
            _log.warning("the notebook cannot be written (%s); the run continues", error)
            self._make_output, self._output = _Nowhere, _Nowhere()

    def _html(self) -> str:
        parts = []
        if self._model is not None:
            heading, text = self._model
            content = html.preformatted(text)
            is_alone = not (self._is_open or self._epochs)
            parts.append(content if is_alone else html.details(heading, content))
        if self._is_open:
            bar = f'<progress value="{self._progress.fraction():.4f}" max="1"></progress>'
            numbers = self._progress.numbers(None) if self._progress.epoch else ""
            status = html.escape(self._progress.status(with_seconds=False))
            parts.append(f"<div>{bar} {status}</div>")
            parts.append(html.preformatted(numbers) if numbers else "")
        if self._epochs:
            header = max((names for _, names, _ in self._epochs), key=len)
            rows = [cells for _, names, cells in self._epochs if len(names) == len(header)]
            parts.append(html.table(header, rows))
        parts.append(self._curve())
        parts += [page for page, _ in self._tables]
        parts.append(html.preformatted("\n".join(self._lines), wraps=True) if self._lines else "")
        return "".join(parts)

    def _curve(self) -> str:
        points = max(map(len, self._curves.values()), default=0)
        if points >= _FEW_EPOCHS:
            return svg.learning_curves(self._curves, most_panels=_MOST_PANELS)
        if max(map(len, self._step_curves.values()), default=0) >= _FEW_EPOCHS:
            options: dict[str, Any] = {"x_label": "step", "most_panels": _MOST_PANELS}
            return svg.learning_curves(self._step_curves, **options)
        return ""

    def _text(self) -> str:
        parts = [] if self._model is None else [self._model[1].rstrip("\n")]
        parts += [line for line, *_ in self._epochs]
        if self._is_open and self._progress.epoch:
            parts.append(self._progress.numbers(None, with_status=True))
        parts += [text.rstrip("\n") for _, text in self._tables]
        return "\n".join([*parts, *self._lines])


def _add(
    curves: dict[str, list[tuple[float, float]]], name: str, point: tuple[float, float]
) -> None:
    """Appends a point to a curve; every second point of a long one is dropped."""
    points = curves.setdefault(name, [])
    points.append(point)
    if len(points) > _MOST_POINTS:
        del points[:-1:2]


class _Nowhere:
    """An output that shows nothing."""

    def show(self, html: str, text: str) -> None:
        """Does nothing."""

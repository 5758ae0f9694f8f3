"""A logger that keeps everything in memory, for tests and notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distaff.core.config import strict_json
from distaff.core.typing import Values
from distaff.loggers.protocol import JSON


@dataclass(frozen=True, kw_only=True)
class Record:
    """One call of `log_metrics`.

    Attributes:
        step: completed optimizer updates.
        epoch: the epoch that the metrics belong to.
        metrics: values by name.
    """

    step: int
    epoch: int
    metrics: Values


@dataclass(frozen=True, kw_only=True)
class Medium:
    """One figure, image, histogram or text.

    Attributes:
        kind: `"figure"`, `"image"`, `"histogram"` or `"text"`.
        name: the name it was logged under.
        content: the Figure or text itself, or a copy of the array.
        step: completed optimizer updates.
    """

    kind: str
    name: str
    content: Any
    step: int


class MemoryLogger:
    """Keeps metrics and media in memory.

    Attributes:
        records: one `Record` per call of `log_metrics`, in order.
        media: one `Medium` per figure, image, histogram or text, in order.
        config: the configuration, `None` before `log_config`.
        status: how the run ended, `None` before `close`.

    >>> logger = MemoryLogger()
    >>> logger.log_metrics({"loss": 0.5}, step=10, epoch=1)
    >>> logger.records
    [Record(step=10, epoch=1, metrics={'loss': 0.5})]
    """

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.media: list[Medium] = []
        self.config: Mapping[str, JSON] | None = None
        self.status: str | None = None

    @classmethod
    def read(cls, path: Path) -> MemoryLogger:
        """Returns a logger with the metrics of a file that a `JsonlLogger` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is another file.
        """
        logger = cls()
        for line in path.read_bytes().splitlines():
            row = {name: _number(value) for name, value in strict_json.loads(line).items()}
            step, epoch = (int(row.pop(name)) for name in ("step", "epoch"))
            del row["time"]
            logger.log_metrics(row, step=step, epoch=epoch)
        return logger

    def log_metrics(self, metrics: Values, *, step: int, epoch: int) -> None:
        """Appends a record."""
        self.records.append(Record(step=step, epoch=epoch, metrics=dict(metrics)))

    def log_config(self, config: Mapping[str, JSON]) -> None:
        """Keeps the configuration."""
        self.config = dict(config)

    def log_figure(self, name: str, figure: Any, *, step: int) -> None:
        """Keeps the figure."""
        self.media.append(Medium(kind="figure", name=name, content=figure, step=step))

    def log_image(self, name: str, image: Any, *, step: int) -> None:
        """Keeps a copy of the image."""
        self.media.append(Medium(kind="image", name=name, content=np.array(image), step=step))

    def log_histogram(self, name: str, values: Any, *, step: int) -> None:
        """Keeps a copy of the values."""
        self.media.append(Medium(kind="histogram", name=name, content=np.array(values), step=step))

    def log_text(self, name: str, text: str, *, step: int) -> None:
        """Keeps the text."""
        self.media.append(Medium(kind="text", name=name, content=text, step=step))

    def series(self, *prefixes: str) -> dict[str, list[tuple[int, float]]]:
        """Returns the scalar metrics over epochs, for learning curves.

        Args:
            *prefixes: prefixes of names, such as `"train/"`; all metrics without any.

        Returns:
            `(epoch, value)` pairs by name, in the order of recording.
        """
        series: dict[str, list[tuple[int, float]]] = {}
        for record in self.records:
            for name, value in record.metrics.items():
                if name.startswith(prefixes or "") and np.ndim(value) == 0:
                    series.setdefault(name, []).append((record.epoch, float(value)))
        return series

    def position(self) -> list[int]:
        """Returns the numbers of records and media."""
        return [len(self.records), len(self.media)]

    def resume(self, step: int, position: JSON = None) -> None:
        """Drops later records and media, and resets the status; see `ResumingLogger`."""
        match position:
            case [int() as records, int() as media]:
                del self.records[records:], self.media[media:]
            case _:
                self.records = [record for record in self.records if record.step <= step]
                self.media = [medium for medium in self.media if medium.step <= step]
        self.status = None

    def close(self, status: str) -> None:
        """Keeps the status of the first call."""
        if self.status is None:
            self.status = status


def _number(value: JSON) -> Any:
    """Returns a logged number or array; NaN and infinity are strings in JSON."""
    return np.asarray(value, np.float64) if isinstance(value, list) else float(value)  # ty: ignore

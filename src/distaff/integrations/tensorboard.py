"""TensorBoard: event files, written by tensorboardX without TensorFlow."""

from __future__ import annotations

import itertools
import json
import os
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter
from tensorboardX.proto.summary_pb2 import Summary  # ty: ignore[import-not-found] made at import

from distaff.core.typing import Values
from distaff.loggers import png
from distaff.loggers.disk import Location, locator
from distaff.loggers.protocol import JSON
from distaff.loggers.row import as_arrays

_writers = itertools.count()


class TensorBoardLogger:
    """Writes event files, to view with `tensorboard --logdir <directory>`.

    TensorBoard stores float32. Metrics that are not scalars become histograms of their finite
    values, the epoch a curve, and the configuration a text. Supports figures, images, histograms
    and texts. The first call creates the file; the first call after `close` creates another.

    Args:
        directory: the directory, or a function that returns it, called when a file is created.
    """

    def __init__(self, directory: Location) -> None:
        self._locate = locator(directory)
        self._open_writer: SummaryWriter | None = None
        self._purged_from: int | None = None

    def log_metrics(self, metrics: Values, *, step: int, epoch: int) -> None:
        """Writes the epoch, then the metrics; flushed every ten seconds.

        Raises:
            MetricError: a metric is not a number, or has a reserved name: `step`, `epoch`, `time`.
        """
        arrays = as_arrays(metrics)
        self._writer.add_scalar("epoch", epoch, step)
        for name, array in arrays.items():
            if array.ndim == 0:
                self._writer.add_scalar(name, array.item(), step)
            else:
                self.log_histogram(name, array, step=step)

    def log_config(self, config: Mapping[str, JSON]) -> None:
        """Writes the configuration as the text `config`."""
        # Markdown shows an indented block verbatim.
        lines = json.dumps(config, indent=2).splitlines()
        self._writer.add_text("config", "\n".join(f"    {line}" for line in lines), 0)

    def log_figure(self, name: str, figure: Any, *, step: int) -> None:
        """Writes a matplotlib Figure as an image."""
        self._add_png(name, png.encode_figure(figure), step)

    def log_image(self, name: str, image: Any, *, step: int) -> None:
        """Writes an image; see `MediaLogger`."""
        self._add_png(name, png.encode(image), step)

    def log_histogram(self, name: str, values: Any, *, step: int) -> None:
        """Writes a histogram of the finite values, if there are any."""
        numbers = np.asarray(values, np.float64)
        finite = numbers[np.isfinite(numbers)]
        if finite.size:
            self._writer.add_histogram(name, finite, step)

    def log_text(self, name: str, text: str, *, step: int) -> None:
        """Writes a text, which TensorBoard shows as Markdown."""
        self._writer.add_text(name, text, step)

    def close(self, status: str) -> None:
        """Flushes and closes the file."""
        writer, self._open_writer = self._open_writer, None
        if writer is not None:
            writer.close()

    def resume(self, step: int) -> None:
        """Makes TensorBoard hide later steps of earlier files."""
        self.close("interrupted")
        self._purged_from = step + 1

    @property
    def _writer(self) -> SummaryWriter:
        if self._open_writer is None:
            # File names contain second and host; the suffix distinguishes files of one second.
            suffix = f".{os.getpid()}.{next(_writers)}"
            self._open_writer = SummaryWriter(
                logdir=os.fspath(self._locate()),
                purge_step=self._purged_from,
                filename_suffix=suffix,
                flush_secs=10,
            )
            self._purged_from = None
        return self._open_writer

    def _add_png(self, name: str, encoded: bytes, step: int) -> None:
        # add_image would encode it again, with Pillow.
        width, height = struct.unpack(">2I", encoded[16:24])
        image = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=encoded
        )
        file = self._writer.file_writer
        assert file is not None  # until it is closed
        file.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

"""TensorBoard, through tensorboardX, which writes its files without TensorFlow."""

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
    """Writes event files: `tensorboard --logdir <directory>` shows them.

    TensorBoard keeps numbers in float32. A metric that is not one number is a histogram of its
    finite values; the epoch is a curve of its own; the configuration is a text. Takes figures,
    images, histograms and texts. The file is made by the first call, and after `close` the next
    call makes another beside it.

    Args:
        directory: where, or a function that gives it, called when a file is made.
    """

    def __init__(self, directory: Location) -> None:
        self._locate = locator(directory)
        self._open_writer: SummaryWriter | None = None
        self._purged_from: int | None = None

    def log_metrics(self, metrics: Values, *, step: int, epoch: int) -> None:
        """Writes the epoch, then the metrics; they are in the file ten seconds later.

        Raises:
            MetricError: a metric is not a number, or is named `step`, `epoch` or `time`.
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
        # Markdown shows an indented block as it is.
        lines = json.dumps(config, indent=2).splitlines()
        self._writer.add_text("config", "\n".join(f"    {line}" for line in lines), 0)

    def log_figure(self, name: str, figure: Any, *, step: int) -> None:
        """Writes a matplotlib Figure as a picture."""
        self._add_png(name, png.encode_figure(figure), step)

    def log_image(self, name: str, image: Any, *, step: int) -> None:
        """Writes an image; see `MediaLogger`."""
        self._add_png(name, png.encode(image), step)

    def log_histogram(self, name: str, values: Any, *, step: int) -> None:
        """Writes a histogram of the finite values; nothing where there are none."""
        numbers = np.asarray(values, np.float64)
        finite = numbers[np.isfinite(numbers)]
        if finite.size:
            self._writer.add_histogram(name, finite, step)

    def log_text(self, name: str, text: str, *, step: int) -> None:
        """Writes a text, which TensorBoard shows as Markdown."""
        self._writer.add_text(name, text, step)

    def close(self, status: str) -> None:
        """Writes what is held and closes the file."""
        writer, self._open_writer = self._open_writer, None
        if writer is not None:
            writer.close()

    def resume(self, step: int) -> None:
        """Notes that TensorBoard shall not show what the files before hold of later steps."""
        self.close("interrupted")
        self._purged_from = step + 1

    @property
    def _writer(self) -> SummaryWriter:
        if self._open_writer is None:
            # A file is named by second and host: two made in one second would be one file.
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
        # add_image would encode by Pillow; the picture is PNG already.
        width, height = struct.unpack(">2I", encoded[16:24])
        image = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=encoded
        )
        file = self._writer.file_writer
        assert file is not None  # until it is closed
        file.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

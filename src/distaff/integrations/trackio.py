"""trackio: records a run in files on this machine, on a server, or in a Hugging Face Space."""

from __future__ import annotations

import contextlib
import html
import io
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import trackio
from trackio import context_vars

from distaff.core.typing import Values
from distaff.errors import ConfigError
from distaff.loggers import png
from distaff.loggers.protocol import JSON
from distaff.loggers.row import as_arrays

_OWN = ("project", "name", "config", "resume", "embed")


class TrackioLogger:
    """Records a run with trackio, by default in files that need no network.

    The files are in trackio's own directory, that of the environment variable `TRACKIO_DIR` when
    trackio is imported; `trackio show` displays all projects in it. Metrics that are not scalars
    become histograms. Supports figures, images, histograms and texts. The first call starts the
    run; the first call after `close` starts another. A resumed run continues its trackio run; after
    a kill, repeated records have the same `step`.

    Args:
        project: the name of the project.
        name: the name of the run, unique in the project, since a run of that name is continued.
            Default: `project`, and a random suffix.
        **options: further arguments of `trackio.init`, such as `space_id`, `server_url`, `group`.

    Raises:
        ConfigError: an option is reserved for the logger.
    """

    def __init__(self, project: str, *, name: str | None = None, **options: Any) -> None:
        if taken := sorted(options.keys() & set(_OWN)):
            raise ConfigError(
                f"TrackioLogger itself sets {', '.join(_OWN)} of trackio.init; got "
                f"{', '.join(taken)}. Use project and name; the configuration comes from the run."
            )
        self._project, self._given_name, self._options = project, name, options
        self._name = name
        self._open_run: trackio.Run | None = None

    def log_metrics(self, metrics: Values, *, step: int, epoch: int) -> None:
        """Records a row.

        Raises:
            MetricError: a metric is not a number, or has a reserved name: `step`, `epoch`, `time`.
        """
        row = {
            name: array.item() if array.ndim == 0 else trackio.Histogram(array)
            for name, array in as_arrays(metrics).items()
        }
        self._opened().log({"epoch": int(epoch), **row}, step=int(step))

    def log_config(self, config: Mapping[str, JSON]) -> None:
        """Records the configuration, together with the first metrics."""
        self._opened().config.update(config)

    def log_figure(self, name: str, figure: Any, *, step: int) -> None:
        """Records a matplotlib Figure as an image."""
        self._log_png(name, png.encode_figure(figure), step)

    def log_image(self, name: str, image: Any, *, step: int) -> None:
        """Records an image; see `MediaLogger`."""
        self._log_png(name, png.encode(image), step)

    def log_histogram(self, name: str, values: Any, *, step: int) -> None:
        """Records a histogram of the finite values."""
        histogram = trackio.Histogram(np.asarray(values, np.float64))
        self._opened().log({name: histogram}, step=int(step))

    def log_text(self, name: str, text: str, *, step: int) -> None:
        """Records a text verbatim."""
        shown = trackio.Html(f"<pre>{html.escape(text)}</pre>")
        self._opened().log({name: shown}, step=int(step))

    def close(self, status: str) -> None:
        """Ends the run; trackio has no status."""
        run, self._open_run, self._name = self._open_run, None, self._given_name
        if run is not None:
            with _silent():
                run.finish()

    def get_state(self) -> JSON:
        """Returns the name of the run; None before the first call."""
        return None if self._name is None else {"name": self._name}

    def set_state(self, state: JSON) -> None:
        """Makes the next call continue a run."""
        match state:
            case {"name": str() as name} if name:
                self._name = name

    def set_group(self, group: str) -> None:
        """Sets `group` of `trackio.init`, unless it is set."""
        self._options.setdefault("group", group)

    def _log_png(self, name: str, content: bytes, step: int) -> None:
        with tempfile.TemporaryDirectory() as directory:  # trackio copies the file
            file = Path(directory, "image.png")
            file.write_bytes(content)
            self._opened().log({name: trackio.Image(file)}, step=int(step))

    def _opened(self) -> trackio.Run:
        if self._open_run is None:
            self._name = self._name or f"{self._project}-{secrets.token_hex(4)}"
            # trackio would finish its current run, that of another logger.
            context_vars.current_run.set(None)
            with _silent():
                self._open_run = trackio.init(
                    self._project, self._name, resume="allow", embed=False, **self._options
                )
            context_vars.current_run.set(None)
        return self._open_run


def _silent() -> contextlib.AbstractContextManager[Any]:
    """Discards what trackio prints about its directory and its commands."""
    return contextlib.redirect_stdout(io.StringIO())

"""Weights & Biases: records a run online, or in files to synchronize later."""

from __future__ import annotations

import html
import os
import secrets
import string
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import wandb

from distaff.core.typing import Values
from distaff.errors import ConfigError
from distaff.loggers.disk import Location, locator
from distaff.loggers.png import as_pixels, encode_figure
from distaff.loggers.protocol import JSON
from distaff.loggers.row import as_arrays

# 255 is the code that Weights & Biases itself uses for an interrupted run.
_EXIT_CODES = {"finished": 0, "stopped": 0, "pruned": 0, "interrupted": 255, "failed": 1}
_LETTERS = string.ascii_lowercase + string.digits
_OWN = ("project", "mode", "dir", "config", "reinit")


class WandbLogger:
    """Records a run in Weights & Biases.

    Metrics that are not scalars become histograms of their finite values. The x axis is the metric
    `step`, because a run may log an earlier step, such as the test of its best model, while the
    service's own step only grows. Supports figures, images, histograms and texts. The first call
    starts the run; the first call after `close` starts another. A resumed run continues its run in
    Weights & Biases; after a kill, repeated records have the same `step`.

    Args:
        project: the name of the project.
        mode: `"online"`; `"offline"`, which needs no network and writes files for `wandb sync`; or
            `"disabled"`. None for the environment variable `WANDB_MODE`, by default online.
        directory: parent of the folder `wandb` for files, or a function that returns it.
        **options: further arguments of `wandb.init`, such as `name`, `group`, `tags`, `entity`.

    Raises:
        ConfigError: an option is reserved for the logger.
    """

    def __init__(
        self,
        project: str,
        *,
        mode: Literal["online", "offline", "disabled"] | None = None,
        directory: Location = ".",
        **options: Any,
    ) -> None:
        if taken := sorted(options.keys() & set(_OWN)):
            raise ConfigError(
                f"WandbLogger itself sets {', '.join(_OWN)} of wandb.init; got {', '.join(taken)}. "
                "Use project, mode and directory; the configuration comes from the run."
            )
        self._options: dict[str, Any] = {"project": project, "mode": mode, **options}
        self._locate = locator(directory)
        self._open_run: wandb.Run | None = None
        self._id: str | None = options.get("id")

    def log_metrics(self, metrics: Values, *, step: int, epoch: int) -> None:
        """Records a row.

        Raises:
            MetricError: a metric is not a number, or has a reserved name: `step`, `epoch`, `time`.
        """
        row = {
            name: array.item() if array.ndim == 0 else _histogram(array)
            for name, array in as_arrays(metrics).items()
        }
        self._run.log({"step": int(step), "epoch": int(epoch), **row})

    def log_config(self, config: Mapping[str, JSON]) -> None:
        """Records the configuration."""
        self._run.config.update(dict(config), allow_val_change=True)

    def log_figure(self, name: str, figure: Any, *, step: int) -> None:
        """Records a matplotlib Figure as an image."""
        # wandb.Image would need pyplot for a Figure. It copies the file.
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory, "figure.png")
            file.write_bytes(encode_figure(figure))
            self._run.log({"step": int(step), name: wandb.Image(file)})

    def log_image(self, name: str, image: Any, *, step: int) -> None:
        """Records an image; see `MediaLogger`."""
        self._run.log({"step": int(step), name: wandb.Image(as_pixels(image))})

    def log_histogram(self, name: str, values: Any, *, step: int) -> None:
        """Records a histogram of the finite values."""
        self._run.log({"step": int(step), name: _histogram(np.asarray(values, np.float64))})

    def log_text(self, name: str, text: str, *, step: int) -> None:
        """Records a text verbatim."""
        shown = wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)
        self._run.log({"step": int(step), name: shown})

    def close(self, status: str) -> None:
        """Ends the run with exit code 0, 1 (failed) or 255 (interrupted)."""
        run, self._open_run = self._open_run, None
        self._id = self._options.get("id")
        if run is not None:
            run.finish(exit_code=_EXIT_CODES.get(status, 1))

    def get_state(self) -> JSON:
        """Returns the id of the run; None before the first call."""
        return None if self._id is None else {"id": self._id}

    def set_state(self, state: JSON) -> None:
        """Makes the next call continue a run."""
        match state:
            case {"id": str() as identity} if identity:
                self._id = identity

    def set_group(self, group: str) -> None:
        """Sets `group` of `wandb.init`, unless it or `WANDB_RUN_GROUP` is set."""
        if "WANDB_RUN_GROUP" not in os.environ:
            self._options.setdefault("group", group)

    @property
    def _run(self) -> wandb.Run:
        if self._open_run is None:
            directory = Path(self._locate()).absolute()
            directory.mkdir(parents=True, exist_ok=True)
            # Chosen here, so that the id does not depend on whether the service is reachable.
            self._id = self._id or "".join(secrets.choice(_LETTERS) for _ in range(8))
            options: dict[str, Any] = {"resume": "allow", **self._options, "id": self._id}
            self._open_run = wandb.init(dir=str(directory), reinit="create_new", **options)
            self._open_run.define_metric("*", step_metric="step")
        return self._open_run


def _histogram(values: np.ndarray) -> wandb.Histogram:
    return wandb.Histogram(values[np.isfinite(values)])

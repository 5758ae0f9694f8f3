"""Weights & Biases: a run of its own for each run, online or in files to be synchronized later."""

from __future__ import annotations

import html
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

# 255 is what Weights & Biases itself notes for a run that was interrupted.
_EXIT_CODES = {"finished": 0, "stopped": 0, "pruned": 0, "interrupted": 255, "failed": 1}
_LETTERS = string.ascii_lowercase + string.digits
_OWN = ("project", "mode", "dir", "config", "reinit")


class WandbLogger:
    """Records a run in Weights & Biases.

    A metric that is not one number is a histogram of its finite values. Curves are drawn over
    `step`, a column beside `epoch`: a run may go back to an earlier step, as the test of its best
    model does, while the service's own step only grows. Takes figures, images, histograms and
    texts. The run starts with the first call, and after `close` the next call starts another. A run
    that Distaff resumes continues its run in Weights & Biases; what it logs again, after a kill,
    has the same `step`.

    Args:
        project: the project's name.
        mode: `"online"`; `"offline"`, which needs no network and leaves files for `wandb sync`; or
            `"disabled"`. None is what `WANDB_MODE` says, and online where it says nothing.
        directory: where the files go, in its folder `wandb`; or a function that gives it.
        **options: further arguments of `wandb.init`, such as `name`, `group`, `tags`, `entity`.

    Raises:
        ConfigError: an option is one that the logger itself decides.
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
                f"WandbLogger itself gives wandb.init {', '.join(_OWN)}; got {', '.join(taken)}. "
                "Use project, mode and directory; the configuration comes from the run."
            )
        self._options: dict[str, Any] = {"project": project, "mode": mode, **options}
        self._locate = locator(directory)
        self._open_run: wandb.Run | None = None
        self._id: str | None = options.get("id")

    def log_metrics(self, metrics: Values, *, step: int, epoch: int) -> None:
        """Records a row.

        Raises:
            MetricError: a metric is not a number, or is named `step`, `epoch` or `time`.
        """
        row = {
            name: array.item() if array.ndim == 0 else _histogram(array)
            for name, array in as_arrays(metrics).items()
        }
        self._run.log({"step": int(step), "epoch": int(epoch), **row})

    def log_config(self, config: Mapping[str, JSON]) -> None:
        """Records the configuration as the run's."""
        self._run.config.update(dict(config), allow_val_change=True)

    def log_figure(self, name: str, figure: Any, *, step: int) -> None:
        """Records a matplotlib Figure as a picture."""
        # Given a Figure itself, wandb.Image would need pyplot. The file is copied by the call.
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
        """Records a text as it is, without markup."""
        shown = wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)
        self._run.log({"step": int(step), name: shown})

    def close(self, status: str) -> None:
        """Ends the run: with exit code 0, 1 where it failed, 255 where it was interrupted."""
        run, self._open_run = self._open_run, None
        self._id = self._options.get("id")
        if run is not None:
            run.finish(exit_code=_EXIT_CODES.get(status, 1))

    def get_state(self) -> JSON:
        """Returns the id of the run; None before the first call."""
        return None if self._id is None else {"id": self._id}

    def set_state(self, state: JSON) -> None:
        """Has the next call continue a run."""
        match state:
            case {"id": str() as identity} if identity:
                self._id = identity

    @property
    def _run(self) -> wandb.Run:
        if self._open_run is None:
            directory = Path(self._locate()).absolute()
            directory.mkdir(parents=True, exist_ok=True)
            # The id is chosen here, so that a service that is away for a moment changes nothing.
            self._id = self._id or "".join(secrets.choice(_LETTERS) for _ in range(8))
            options: dict[str, Any] = {"resume": "allow", **self._options, "id": self._id}
            self._open_run = wandb.init(dir=str(directory), reinit="create_new", **options)
            self._open_run.define_metric("*", step_metric="step")
        return self._open_run


def _histogram(values: np.ndarray) -> wandb.Histogram:
    return wandb.Histogram(values[np.isfinite(values)])

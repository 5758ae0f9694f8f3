"""MLflow: records a run in a local directory or on a server."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Before the import, which would start MLflow's telemetry.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# MLflow retries 7 times, so each call to a server that is down would stop the training for minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from distaff.core.typing import Values
from distaff.loggers import png
from distaff.loggers.disk import Location, locator, replace
from distaff.loggers.files import file_name
from distaff.loggers.protocol import JSON
from distaff.loggers.row import as_arrays

_STATUSES = {
    **dict.fromkeys(("finished", "stopped", "pruned"), "FINISHED"),
    "interrupted": "KILLED",
}
# https://mlflow.org/docs/latest/rest-api.html, "Request Limits".
_GROUP = "distaff.group"
_MAX_METRICS, _MAX_PARAMS, _MAX_KEY = 1000, 100, 250


class MlflowLogger:
    """Records a run in MLflow, by default in the files of a directory.

    The configuration is recorded as parameters with dotted names, whose values MLflow truncates to
    6000 characters, and in full as the artifact `config.json`. Metrics must be scalars; others are
    ignored. A database stores the largest float instead of infinity. Figures, images and texts
    become artifacts. The first call starts the run; the first call after `close` starts another. A
    resumed run continues its MLflow run, whose parameters cannot change.

    If a server is down, each call waits about 4 seconds, for two retries, before it fails; the
    environment variable `MLFLOW_HTTP_REQUEST_MAX_RETRIES` sets another number.

    To view a directory, use `mlflow ui --backend-store-uri <directory>` with the environment
    variable `MLFLOW_ALLOW_FILE_STORE=true`. This needs the package `mlflow`; the extra
    `distaff[mlflow]` installs only the client.

    Args:
        directory: the directory, or a function that returns it, called when a run starts.
        experiment: the name of the experiment, which is created if it does not exist.
        run_name: the name of the run; None lets MLflow choose one.
        tracking_uri: a server or database to use instead of the directory; a database needs the
            package `mlflow`.
        clock: returns the Unix time in seconds.
    """

    def __init__(
        self,
        directory: Location = "mlruns",
        *,
        experiment: str = "distaff",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._locate = locator(directory)
        self._experiment = experiment
        self._run_name = run_name
        self._tracking_uri = tracking_uri
        self._clock = clock
        self._run: tuple[MlflowClient, str] | None = None
        self._resumed: str | None = None
        self._group: str | None = None

    def log_metrics(self, metrics: Values, *, step: int, epoch: int) -> None:
        """Records the scalar metrics, and the epoch as the metric `epoch`.

        Characters that MLflow does not allow in names become "_".

        Raises:
            MetricError: a metric is not a number, or has a reserved name: `step`, `epoch`, `time`.
        """
        numbers = {k: array.item() for k, array in as_arrays(metrics).items() if array.ndim == 0}
        now = int(1000 * self._clock())
        entries = [
            Metric(_key(name), value, now, int(step))
            for name, value in {"epoch": float(epoch), **numbers}.items()
        ]
        client, run = self._opened()
        for start in range(0, len(entries), _MAX_METRICS):
            client.log_batch(run, metrics=entries[start : start + _MAX_METRICS])

    def log_config(self, config: Mapping[str, JSON]) -> None:
        """Records the configuration as parameters, and as `config.json`."""
        # In the file store, a "/" creates a directory, which cannot also be a parameter.
        values = {_key(name).replace("/", "_"): text for name, text in _flat(config)}
        client, run = self._opened()
        known = client.get_run(run).data.params  # not empty in a resumed run
        params = [Param(name, text) for name, text in values.items() if name not in known]
        for start in range(0, len(params), _MAX_PARAMS):
            client.log_batch(run, params=params[start : start + _MAX_PARAMS])
        self._add_file("config.json", json.dumps(config, indent=2).encode())

    def log_figure(self, name: str, figure: Any, *, step: int) -> None:
        """Records a matplotlib Figure as the artifact `figures/<name>_<step>.png`."""
        self._add_file(file_name("figures", name, step, "png"), png.encode_figure(figure))

    def log_image(self, name: str, image: Any, *, step: int) -> None:
        """Records an image as the artifact `images/<name>_<step>.png`; see `MediaLogger`."""
        self._add_file(file_name("images", name, step, "png"), png.encode(image))

    def log_text(self, name: str, text: str, *, step: int) -> None:
        """Records a text as the artifact `texts/<name>_<step>.txt`."""
        self._add_file(file_name("texts", name, step, "txt"), text.encode())

    def close(self, status: str) -> None:
        """Ends the run with the MLflow status FINISHED, KILLED (interrupted) or FAILED."""
        opened, self._run, self._resumed = self._run, None, None
        if opened is not None:
            client, run = opened
            client.set_terminated(run, _STATUSES.get(status, "FAILED"))

    def get_state(self) -> JSON:
        """Returns the id of the run; None before the first call."""
        run = self._resumed if self._run is None else self._run[1]
        return None if run is None else {"run_id": run}

    def set_state(self, state: JSON) -> None:
        """Makes the next call continue a run, if it still exists."""
        match state:
            case {"run_id": str() as run} if run:
                self._resumed = run

    def set_group(self, group: str) -> None:
        """Nests the next run below a parent run of this name, which is created if necessary."""
        self._group = group

    def _opened(self) -> tuple[MlflowClient, str]:
        if self._run is None:
            uri = self._tracking_uri
            if uri is None:
                # MLflow raises for a directory without this variable.
                os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
                uri = str(Path(self._locate()).absolute())
            client = MlflowClient(tracking_uri=uri)
            if self._resumed is not None and self._is_continued(client, self._resumed):
                self._run = client, self._resumed
                return self._run
            experiment = client.get_experiment_by_name(self._experiment)
            identity = (
                experiment.experiment_id
                if experiment
                else client.create_experiment(self._experiment)
            )
            parent = None if self._group is None else _parent(client, identity, self._group)
            tags = None if parent is None else {MLFLOW_PARENT_RUN_ID: parent}
            run = client.create_run(identity, run_name=self._run_name, tags=tags)
            self._run = client, run.info.run_id
        return self._run

    def _is_continued(self, client: MlflowClient, run: str) -> bool:
        """Reopens a run; returns False if it no longer exists."""
        try:
            if client.get_run(run).info.lifecycle_stage == "deleted":
                return False
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        client.update_run(run, status="RUNNING")
        return True

    def _add_file(self, name: str, content: bytes) -> None:
        client, run = self._opened()
        with tempfile.TemporaryDirectory() as directory:
            replace(Path(directory, name), content)
            client.log_artifacts(run, directory)


def _parent(client: MlflowClient, experiment: str, group: str) -> str:
    """Returns the run that represents a group, which is created if necessary."""

    def found() -> list[str]:
        runs = client.search_runs([experiment], f"tags.`{_GROUP}` LIKE '%'")
        runs = [run for run in runs if run.data.tags[_GROUP] == group]  # with any characters
        return [run.info.run_id for run in sorted(runs, key=lambda run: run.info.start_time)]

    if not found():
        run = client.create_run(experiment, run_name=group, tags={_GROUP: group})
        client.set_terminated(run.info.run_id)
    return found()[0]  # also if two processes have created one


def _key(name: str) -> str:
    return re.sub(r"[^\w./: -]", "_", name)[:_MAX_KEY]


def _flat(value: JSON, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields the leaves of nested mappings as text with dotted names; a list is one leaf."""
    if isinstance(value, Mapping) and value:
        for name, member in value.items():
            yield from _flat(member, f"{prefix}.{name}" if prefix else str(name))
    elif prefix:
        yield prefix, value if isinstance(value, str) else json.dumps(value)

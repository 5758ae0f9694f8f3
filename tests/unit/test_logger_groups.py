"""The trials of a study as a group of its loggers."""

from __future__ import annotations

from typing import Any

import pytest
import wandb
from mlflow import MlflowClient

from distaff import loggers
from distaff.loggers import ManyLoggers, MemoryLogger, MlflowLogger, TolerantLogger, WandbLogger


class Grouped(MemoryLogger):
    group: str | None = None

    def set_group(self, group: str) -> None:
        self.group = group


def test_loggers_with_groups_get_one_and_others_do_not_mind():
    one, other = Grouped(), Grouped()
    many = ManyLoggers(MemoryLogger(), one, TolerantLogger(other, "on_failed_log"))
    many.set_group("study")
    assert (one.group, other.group) == ("study", "study")


@pytest.mark.parametrize(
    ("options", "variable", "passed"),
    [({}, None, "study"), ({"group": "mine"}, None, "mine"), ({}, "outer", None)],
)
def test_weights_and_biases_gets_the_group_unless_the_user_has_set_one(
    options, variable, passed, monkeypatch, tmp_path
):
    if variable is not None:
        monkeypatch.setenv("WANDB_RUN_GROUP", variable)
    calls: list[dict[str, Any]] = []

    def init(**given: Any) -> None:
        calls.append(given)
        raise KeyError

    monkeypatch.setattr(wandb, "init", init)
    logger = WandbLogger("project", directory=tmp_path, **options)
    logger.set_group("study")
    with pytest.raises(KeyError):
        logger.log_config({})
    assert calls[0].get("group") == passed


def test_trackio_gets_the_group(monkeypatch):
    trackio = pytest.importorskip("trackio")
    calls: list[dict[str, Any]] = []

    def init(*names: Any, **given: Any) -> None:
        calls.append(given)
        raise KeyError

    monkeypatch.setattr(trackio, "init", init)
    for options in ({}, {"group": "mine"}):
        logger = loggers.TrackioLogger("project", name="run", **options)
        logger.set_group("study")
        with pytest.raises(KeyError):
            logger.log_config({})
    assert [call["group"] for call in calls] == ["study", "mine"]


def test_mlflow_nests_the_trials_below_one_run(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    for name in ("one", "other", None):
        logger = MlflowLogger(tmp_path, run_name=name)
        if name is not None:
            logger.set_group('a "study"')
        logger.log_metrics({"val/loss": 1.0}, step=1, epoch=1)
        logger.close("finished")
    client = MlflowClient(tracking_uri=str(tmp_path))
    experiment = client.get_experiment_by_name("distaff")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert len(runs) == 4
    parent = runs['a "study"']
    assert parent.info.status == "FINISHED"
    assert [runs[n].data.tags.get("mlflow.parentRunId") for n in ("one", "other")] == [
        parent.info.run_id
    ] * 2
    (alone,) = runs.keys() - {'a "study"', "one", "other"}
    assert "mlflow.parentRunId" not in runs[alone].data.tags

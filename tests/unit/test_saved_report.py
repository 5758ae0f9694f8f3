"""`save_report=True`: the report of a run in its directory, however the run ended."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from distaff.errors import ConfigError
from distaff.report import saved
from line import Line, trained
from scripted import Break, InterruptError


def reported(path: Path) -> dict[str, Any]:
    """Returns the facts in the report of a run."""
    text = (path / "report.html").read_text("utf-8")
    (data,) = re.findall(r'id="facts">(.*?)</script>', text, re.DOTALL)
    (run,) = json.loads(data)["runs"]
    return run


def test_report_has_the_end_of_the_run():
    run = trained(Line, save_report=True)
    facts = reported(run.result.path)
    assert (facts["status"], facts["step"]) == ("finished", run.result.step)
    assert facts["metrics"]["test/loss"] == pytest.approx(run.result.metrics["test/loss"])
    assert {"step/loss", "train/loss", "val/loss", "test/loss"} <= set(facts["curves"])
    assert "finished at step" in facts["log"]
    assert not list(run.result.path.glob(".*.tmp"))


def test_interrupted_and_failed_runs_have_one_too():
    run = trained(Line, save_report=True, name="short", max_time=1e-9)
    facts = reported(run.result.path)
    assert (facts["status"], facts["reason"]) == ("interrupted", "max_time=1e-09")
    with pytest.raises(InterruptError):
        trained(Line, save_report=True, name="broken", callbacks=[Break(7)])
    facts = reported(Path("runs/broken/0001"))
    assert facts["status"] == "failed"
    assert "InterruptError" in facts["reason"]


def test_report_that_fails_ends_no_run(monkeypatch, caplog):
    def broken(*args: Any) -> str:
        raise ZeroDivisionError("no room")

    monkeypatch.setattr(saved, "page", broken)
    with caplog.at_level(logging.WARNING):
        run = trained(Line, save_report=True)
    assert run.result.status == "finished"
    assert "report.html" not in run.files
    warnings = [each for each in caplog.messages if "report.html" in each]
    assert len(warnings) == 1
    assert "cannot be written: ZeroDivisionError: no room" in warnings[0]


def test_without_the_option_there_is_none():
    assert "report.html" not in trained(Line).files
    with pytest.raises(ConfigError, match=r"root=None.*Pass a root"):
        trained(Line, save_report=True, root=None)

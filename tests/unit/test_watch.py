"""`distaff watch`: what it shows of a run that another process trains, from its files alone."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from distaff import cli
from distaff.errors import RunDirectoryError
from distaff.report import live
from distaff.report.follow import Follower
from distaff.report.outline import Outline
from distaff.run.directory.run_lock import is_running, locked
from distaff.run.display import PlainDisplay
from line import Line, trained

PLACE = Path("runs/digits/0001")
START = 1_800_000_000.0
DATA = {"data": {"train": {"batch": {"x": "float32[32, 3]"}, "length": 10}}}
CONFIG = {
    "monitor": {"name": "val/loss", "mode": "min"},
    "first_epoch": 1,
    "num_epochs": 30,
    "identity": {"total_steps": 300, **DATA},
}


def write(name: str, value: Any) -> None:
    PLACE.mkdir(parents=True, exist_ok=True)
    (PLACE / name).write_text(json.dumps(value))


def begin(status: str = "running", *, at: float = START, **facts: Any) -> None:
    write("config.json", CONFIG)
    write("env.json", {"starts": [{"time": datetime.fromtimestamp(at, UTC).isoformat()}]})
    write("status.json", {"status": status, "step": 20, "epoch": 2, "reason": "", **facts})


def add(*rows: dict[str, Any]) -> None:
    with (PLACE / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def epoch(number: int, loss: float, at: float | None = None) -> dict[str, Any]:
    time = START + 2.0 * number if at is None else at
    place = {"step": 10 * number, "epoch": number, "time": time}
    return {**place, "train/loss": 2 * loss, "val/loss": loss}


def log(*lines: str) -> None:
    with (PLACE / "log.txt").open("a") as file:
        file.writelines(f"2027-01-15T08:00:00Z INFO distaff: {line}\n" for line in lines)


def shown(*news: Callable[[], None], wait: bool = False) -> tuple[int, list[str]]:
    """Watches; each pause makes the next of the news. Returns the status, and the lines."""
    waiting = list(news)
    stream, clock = io.StringIO(), live.Clock()
    view = live.View(Follower(PLACE), PlainDisplay(stream, clock=clock), clock)
    status = live.follow(view, wait=wait, pause=lambda seconds: waiting.pop(0)())
    assert not waiting
    return status, stream.getvalue().splitlines()


def test_lines_are_those_of_the_run_itself(capsys):
    run = trained(Line, enable_progress_bar=True, steps_per_call=1)
    own = capsys.readouterr().out
    assert cli.main(("watch", "runs/line")) == 0
    lines = capsys.readouterr().out

    def kept(text: str) -> list[str]:
        """Returns the lines without what the clock decides."""
        texts = [
            re.sub(r" +\d+(\.\d)? s( +\d+ examples/s)?", " S", each) for each in text.splitlines()
        ]
        return [each for each in texts if re.match("epoch|loss |  +train|[*] best", each)]

    assert len(kept(own)) >= run.result.epoch + 3
    assert kept(lines) == kept(own)
    assert lines.startswith("watching runs/line/0001\n")
    assert lines.endswith(f"finished at step {run.result.step}\n")


def test_news_are_shown_until_the_end():
    begin()
    log("run /tmp/runs/digits/0001", "compiled the step in 0.5 s")

    def train() -> None:
        add({"step": 5, "epoch": 1, "time": START + 1, "step/loss": 0.9}, epoch(1, 0.5))

    def log_and_train() -> None:
        log("epoch 1/30 step 10 train/loss 1 val/loss 0.5", "skipped bad steps: 12")
        add(epoch(2, 0.7))

    def end() -> None:
        log("finished at step 20")
        metrics = {"train/loss": 1.4, "val/loss": 0.5}
        begin("stopped", reason="EarlyStopping", metrics=metrics, best={"epoch": 1})

    with locked(PLACE):
        status, lines = shown(train, log_and_train, end)
    assert status == 0
    assert lines[0] == "compiled the step in 0.5 s"
    assert lines[1].startswith("epoch  1/30  step  10  train loss 1.0000  val loss 0.5000 ")
    assert lines[1].endswith("examples/s *")
    assert lines[2:4] == ["* best model so far", "skipped bad steps: 12"]
    assert lines[4].startswith("epoch  2/30  step  20 ")
    assert "2.0 s     160 examples/s" in lines[4]
    assert lines[5].split() == ["train,", "epoch", "2", "val,", "epoch", "1", "(best)"]
    assert lines[6].split() == ["loss", "1.4000", "0.5000"]
    assert lines[7:] == ["stopped at step 20: EarlyStopping"]


@pytest.mark.parametrize(
    ("status", "expected"), [("finished", 0), ("pruned", 0), ("failed", 1), ("interrupted", 1)]
)
def test_exit_status_is_how_the_run_ended(status, expected):
    begin(status, reason="why")
    assert shown() == (expected, [f"{status} at step 20: why"])


def test_killed_run_is_named_and_its_resume_awaited():
    begin()
    add(epoch(1, 0.5), epoch(2, 0.4), epoch(3, 0.3))
    status, lines = shown()
    assert (status, lines[-1][:49]) == (1, "Its process is gone; the last step in its log is ")
    assert "30. Run the same command again to resume." in lines[-1]

    def resume() -> None:  # from its checkpoint of epoch 1
        write("run.lock", {})
        (PLACE / "metrics.jsonl").write_text("")
        add(epoch(1, 0.5), epoch(2, 0.45, at=START + 90), epoch(3, 0.35, at=START + 92))
        begin("finished", at=START + 88)

    status, lines = shown(resume, wait=True)
    epochs = [line[:11] for line in lines if line.startswith("epoch")]
    assert epochs == [f"epoch  {n}/30" for n in (1, 2, 3, 2, 3)]
    assert all("  2.0 s" in line for line in lines if line.startswith("epoch"))
    assert "Waiting for it to be resumed." in lines
    assert (status, lines[-1]) == (0, "finished at step 20")


def test_only_the_last_epochs_of_the_past_are_shown():
    begin("finished")
    add(*(epoch(n, 1 / n) for n in range(1, 31)))
    _, lines = shown()
    assert lines[0] == "10 earlier lines are not shown"
    assert lines[1].startswith("epoch 11/30 ")
    assert len(lines) == 1 + 20 + 1 + 1  # the legend, the end


def test_files_may_be_damaged_or_hostile():
    begin("failed", reason="\x1b[2J", metrics=[1], best="x")
    (PLACE / "metrics.jsonl").write_text('garbage\n[1]\n{"step": 1}\n')
    add({**epoch(1, 0.5), "val/\x1b[31m": 1.0, "val/list": [1.0], "val/text": "x"})
    with (PLACE / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "ep')  # not written to its end yet
    log("\x1b]0;title\x07")
    status, lines = shown()
    assert status == 1
    assert not any("\x1b" in line or "\x07" in line for line in lines)
    assert lines.count("A row of metrics.jsonl is damaged, and skipped.") == 3
    assert lines[-1] == r"failed at step 20: \x1b[2J"


def test_removed_run_is_an_error():
    begin()
    with pytest.raises(RunDirectoryError, match="was removed"):
        shown(lambda: shutil.rmtree(PLACE), wait=True)


def test_latest_is_the_run_that_was_last_written(capsys):
    for name, time in (("0001", 30), ("0002", 10), ("0003", 20)):
        path = Path("runs/digits") / name
        path.mkdir(parents=True)
        (path / "config.json").write_text("{}")
        (path / "status.json").write_text('{"status": "finished", "step": 1}')
        os.utime(path / "status.json", (time, time))
    for words in ((), ("latest",), ("runs",), ("latest", "--root", "runs/digits")):
        assert cli.main(("watch", *words)) == 0
        assert capsys.readouterr().out.startswith("watching runs/digits/0001\n")
    assert cli.main(("watch", "runs/digits/0003")) == 0
    assert cli.main(("watch", "latest", "--root", "gone")) == 1
    assert "There is no run below 'gone'" in capsys.readouterr().err


def test_ctrl_c_ends_it(monkeypatch):
    def interrupted(*args: Any, **options: Any) -> int:
        raise KeyboardInterrupt

    begin()
    monkeypatch.setattr(live, "follow", interrupted)
    assert cli.main(("watch", "runs")) == 130


@pytest.mark.parametrize(
    ("given", "epochs", "steps"),
    [
        ({"num_epochs": 30}, 30, 10),
        ({"num_epochs": 3, "first_epoch": 4, "steps_per_epoch": 7}, 6, 7),
        ({"num_epochs": "25 steps", "identity": {"total_steps": 25, **DATA}}, 3, 10),
        ({"num_epochs": "1e9 tokens", "identity": {"total_steps": None, **DATA}}, None, 10),
        ({"num_epochs": None, "identity": None}, None, None),
    ],
)
def test_length_of_a_run_is_that_of_its_configuration(given, epochs, steps):
    outline = Outline.of({**CONFIG, **given})
    assert (outline.num_epochs, outline.steps_per_epoch) == (epochs, steps)


def test_epochs_of_a_run_without_a_last_one_are_shown():
    begin("finished")
    write("config.json", {**CONFIG, "num_epochs": "1e9 tokens", "identity": {**DATA}})
    add(epoch(1, 0.5), epoch(2, 0.4))
    log("run /tmp/runs/digits/0001", "epoch 1 step 10 train/loss 1", "saved", "epoch 2 step 20 x 1")
    _, lines = shown()
    assert lines[0].startswith("epoch 1  step     10  train loss 1.0000")
    assert lines[2] == "saved"
    assert lines[3].startswith("epoch 2  ")


@pytest.mark.parametrize(
    ("change", "expected"),
    [({}, True), ({"started": 1}, False), ({"pid": 2**30}, False), ({"host": "other"}, None)],
)
def test_process_of_a_run_is_looked_up(change, expected):
    PLACE.mkdir(parents=True)
    assert is_running(PLACE) is False
    with locked(PLACE):
        holder = json.loads((PLACE / "run.lock").read_text())
    write("run.lock", {**holder, **change})
    assert is_running(PLACE) is expected

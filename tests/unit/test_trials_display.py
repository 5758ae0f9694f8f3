"""The display of a study: what its table has, leaves out, and marks; and lines elsewhere."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import pytest
from rich.console import Console

from distaff import Monitor
from distaff.run.display import NullDisplay, PlainDisplay, make_trials_display
from distaff.run.display.trials import LiveTrials, TrialsDisplay, TrialsTable
from distaff.tune import Trial

LOSS = Monitor("val/loss")


def trial(number: int, status: str = "finished", value: float | None = 1.0, **rest: Any) -> Trial:
    values = {"optimizer.learning_rate": 0.1, "model.dropout": 0.5, "head.dropout": 0.25}
    return Trial(number, status, value, values, epoch=3, **rest)


def drawn(table: TrialsTable, width: int = 100) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # ty: ignore[unresolved-attribute]


STUDY = [
    trial(0),
    trial(1, "pruned", 0.25),
    trial(2, value=0.5),
    trial(3, "failed", None),
    trial(4, "running", None),
]


def test_table_marks_the_best_trial_that_was_not_pruned():
    title, header, *rows = drawn(TrialsTable(STUDY, LOSS, 8))
    assert title == "4 of 8 trials  2 finished, 1 pruned, 1 failed, 1 running"
    names = ["trial", "status", "epoch", "val/loss", "learning_rate"]
    assert header.split() == [*names, "model.dropout", "head.dropout"]
    assert rows[0].split() == ["0", "finished", "3", "1.0000", "0.1", "0.5", "0.25"]
    assert [row.split()[0] for row in rows if "*" in row] == ["2"]
    assert rows[4].split() == ["4", "running", "3", "0.1", "0.5", "0.25"]


def test_table_leaves_out_parameters_that_do_not_fit():
    _, header, *_ = drawn(TrialsTable(STUDY, LOSS, 8), width=60)
    assert header.split()[3:] == ["val/loss", "learning_rate", "+2"]
    assert all(len(line) <= 60 for line in drawn(TrialsTable(STUDY, LOSS, 8), width=60))


def test_table_leaves_out_earlier_trials_but_not_the_best_and_the_running_ones():
    many = [trial(n, value=0.5 if n == 1 else 1.0) for n in range(20)]
    many[3] = trial(3, "running", None)
    lines = drawn(TrialsTable(many, LOSS, 20, height=10))
    assert len(lines) <= 10
    assert [line.split()[0] for line in lines[2:-1]] == ["1", "3", "16", "17", "18", "19"]
    assert lines[-1] == "and 14 earlier trials"
    assert len(drawn(TrialsTable(many, LOSS, 20))) == 22


def test_table_has_all_objectives():
    found = [trial(0, objectives={"val/size": 2.0, "val/loss": 1.0})]
    _, header, row = drawn(TrialsTable(found, LOSS, 1))
    assert header.split()[3:5] == ["val/loss", "val/size"]
    assert row.split()[3:6] == ["1.0000", "2.0000", "*"]


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_live_table_reads_at_most_once_per_second_and_leaves_the_whole_table():
    terminal, seconds, reads = FakeTerminal(), [100.0], []

    def make_table(height: int | None) -> TrialsTable:
        reads.append(height)
        return TrialsTable(STUDY, LOSS, 8, height)

    console = Console(file=terminal, width=100, height=12, color_system=None)
    live = LiveTrials(NullDisplay(), console, make_table, clock=lambda: seconds[0])
    live.close()
    assert (reads, terminal.getvalue()) == ([], "")  # no trial was left
    for second in (100.0, 100.5, 101.0):
        seconds[0] = second
        live.refresh()
    assert reads == [12, 12]
    live.ended("not shown")
    live.print("a line")
    assert reads == [12, 12, 12]
    live.close()
    live.close()
    assert reads == [12, 12, 12, None]
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "a line" in text
    assert "not shown" not in text
    assert text.rstrip().splitlines()[-1].split()[:2] == ["4", "running"]


@pytest.mark.parametrize(
    ("stream", "kind"), [(FakeTerminal(), LiveTrials), (io.StringIO(), TrialsDisplay)]
)
def test_display_of_a_study_suits_the_stream(stream, kind, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", stream)
    made = make_trials_display(True, lambda: STUDY, LOSS, 8)
    assert type(made) is kind
    assert type(make_trials_display(False, lambda: STUDY, LOSS, 8)) is TrialsDisplay


def test_other_streams_get_a_line_per_trial():
    stream = io.StringIO()
    lines = TrialsDisplay(PlainDisplay(stream))
    lines.refresh(now=True)
    lines.ended("trial 0 (1 of 2)")
    lines.close()
    assert stream.getvalue() == "trial 0 (1 of 2)\n"

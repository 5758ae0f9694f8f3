"""The alert on slow steps: what is measured, what is left out, and how often it speaks."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

import line
from distaff.execution import step_times, timers
from distaff.execution.step_times import SlowSteps, StepTimes
from distaff.execution.timers import Throughput, Timers
from distaff.run.report import Report
from line import Line, trained

STEPS = 4  # of a program


class Simulated:
    """A training whose programs take as long as the test says, on a clock of its own."""

    def __init__(self) -> None:
        self.now, self.step, self.lines = 100.0, 0, list[str]()
        self.timers = Timers(lambda: self.now)
        self.times = StepTimes(self.timers)

    def spend(self, part: str, seconds: float) -> None:
        with self.timers.spent(part):
            self.now += seconds

    def train(self, seconds: float, num_programs: int = 50, **others: float) -> None:
        """Runs programs that take so many seconds on the device, and others between them."""
        for _ in range(num_programs):
            self.spend("device", seconds)
            for part, other in others.items():
                self.spend(part, other)
            self.timers.count(STEPS, 8)
            self.step += STEPS
            if self.timers.since >= self.times.due_at:
                self.lines += filter(None, [self.times.measure(self.step)])


def test_steps_of_twice_the_median_are_one_line_and_all_are_counted():
    run = Simulated()
    run.train(0.1, 1024)
    assert run.lines == []
    assert run.times.slow.number == 0
    run.train(0.25, 64)
    (text,) = run.lines
    assert "62.5 ms per step in steps" in text
    assert "2.5 x the usual 25 ms" in text
    slow = run.times.slow
    assert slow.number == 2
    assert slow.measured == 1088 // 32
    assert slow.seconds == pytest.approx(64 * 0.15)
    run.train(0.1, 64)
    assert run.times.slow.number == 2


def test_next_line_comes_after_ten_minutes():
    run = Simulated()
    for _ in range(20):  # 20 rounds of 48 s
        run.train(0.1, 320)
        run.train(0.5, 32)
    assert run.times.slow.number == 20
    assert len(run.lines) == 2


@pytest.mark.parametrize("seconds", [0.1, 0.19])
def test_steps_below_twice_the_median_are_silent(seconds):
    run = Simulated()
    run.train(0.1, 640)
    run.train(seconds, 320)
    assert run.times.slow == SlowSteps(0, 30, 0.0)


@pytest.mark.parametrize("part", ["data", "evaluation", "checkpoint", "logging", "callbacks"])
def test_time_that_has_a_line_of_its_own_is_left_out(part):
    run = Simulated()
    run.train(0.1, 640)
    run.train(0.1, 320, **{part: 5.0})
    assert run.lines == []
    assert run.times.slow.number == 0


def test_measurement_with_a_compile_is_dropped(monkeypatch):
    run = Simulated()
    run.train(0.1, 640)
    totals = {**timers._COMPILED, "programs": timers._COMPILED["programs"] + 1}
    monkeypatch.setattr(timers, "_COMPILED", totals)
    run.train(10.0, 32)
    assert run.lines == []
    assert run.times.slow == SlowSteps(0, 20, 0.0)


def test_slower_for_good_becomes_the_usual():
    run = Simulated()
    run.train(0.1, 64 * 32)
    run.train(0.3, 64 * 32)
    slow = run.times.slow
    assert 32 <= slow.number <= 33
    run.train(0.3, 640)
    assert run.times.slow.number == slow.number


def test_few_and_short_programs_are_measured_together():
    run = Simulated()
    run.train(5.0, 31)
    assert run.times.slow.measured == 0
    run.train(5.0, 1)
    assert run.times.slow.measured == 1
    quick = Simulated()
    quick.train(0.001, 10_000)  # 10 s
    assert quick.times.slow.measured <= 20


def test_report_has_the_sum_where_it_is_worth_a_line():
    read = Throughput(10, 20, {**dict.fromkeys(timers.PARTS, 0.0), "device": 9.0}, 0, 0)
    (remark,) = Report(read, slow=SlowSteps(3, 120, 14.2)).remarks()
    assert remark.startswith("slow   in 3 of 120 measurements a step took more than twice the")
    assert "14.2 s longer" in remark
    assert Report(read, slow=SlowSteps(1, 120, 0.4)).remarks() == []
    facts = json.loads(json.dumps(Report(read, slow=SlowSteps(3, 120, 14.2)).facts()))
    assert facts["slow"] == {"number": 3, "measured": 120, "seconds": 14.2}
    assert Report(read).facts()["slow"] is None


def test_run_logs_the_line_and_has_the_count_in_its_status(monkeypatch, caplog):
    plain = trained(Line, root="plain")

    def judge(self: StepTimes, lap: Any, step: int) -> str:
        self._number += 1
        return f"slow steps: {lap.steps} to {step}"

    monkeypatch.setattr(step_times, "_SECONDS", -1e9)
    monkeypatch.setattr(step_times, "_CALLS", 1)
    monkeypatch.setattr(StepTimes, "_judge", judge)
    with caplog.at_level(logging.INFO, "distaff"):
        found = trained(Line, root="slow")
    lines = [each for each in caplog.messages if each.startswith("slow steps")]
    assert lines[-1] == f"slow steps: 2 to {line.NUM_STEPS}"
    status = json.loads((found.result.path / "status.json").read_text())
    assert status["throughput"]["slow"]["number"] == len(lines) > 1
    assert found.logged == plain.logged

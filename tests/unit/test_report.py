"""The report on a run's throughput: what it says, when it counts FLOPs, and what it leaves out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from distaff import OptimizerConfig, data, tasks, zoo
from distaff.data import as_loader, limited
from distaff.execution.flops import Flops
from distaff.execution.timers import PARTS, Throughput
from distaff.run.display import PlainDisplay
from distaff.run.report import Report, faster_data, make_report


def read(**seconds: float) -> Throughput:
    spent = {**dict.fromkeys(PARTS, 0.0), **seconds}
    return Throughput(steps=4000, examples=64000, seconds=spent, programs=7, cached=3)


def test_lines_say_how_fast_and_where_the_time_went():
    report = Report(read(device=6, host=1.5, logging=0.01, compile=2, evaluation=0.49))
    assert report.lines() == [
        "speed  533 steps/s, 8,522 examples/s, 1.88 ms per step (device 1.5, host 0.375)",
        "time   10.0 s: training 75%, evaluation 5%, compile 20%; "
        "7 programs compiled, 3 of them cached",
    ]


def test_lines_name_the_peak_that_the_share_is_of():
    lines = Report(read(device=10), Flops(2.5e6, at_least=False), 4e9).lines()
    assert lines[1] == (
        "FLOPs  2.5 MFLOP per step, 1 GFLOP/s: 25.0% of the 4 GFLOP/s measured for float32 matrix "
        "products"
    )
    no_peak = Report(read(device=10), Flops(2.5e6, at_least=True)).lines()
    assert no_peak[1] == "FLOPs  at least 2.5 MFLOP per step, at least 1 GFLOP/s"


@pytest.mark.parametrize(("waiting", "is_said"), [(0.99, False), (1.01, True)])
def test_lines_say_what_to_do_where_a_tenth_of_the_training_waits_for_data(waiting, is_said):
    lines = Report(read(device=10 - waiting, data=waiting, compile=100)).lines()
    assert (
        "10% of training time was spent waiting for data. Pass arrays as" in lines[-1]
    ) == is_said
    assert len(lines) == 2 + is_said


def test_lines_ignore_a_short_wait_of_a_short_run():
    assert Report(read(device=0.5, data=0.5)).remarks() == []
    (remark,) = Report(read(device=0.5, data=1.0), advice="Do less.").remarks()
    assert remark == "data   67% of training time was spent waiting for data. Do less."


@pytest.mark.parametrize(
    ("change", "says", "is_silent_on"),
    [
        (lambda loader: loader, "larger batch_size", "ArrayLoader"),
        (lambda loader: data.MappedLoader(loader, lambda batch: batch), "functions", "ArrayLoader"),
        (lambda loader: limited(loader, 2), "larger batch_size", "ArrayLoader"),
        (list, "Pass arrays as a data.ArrayLoader", "larger"),
    ],
)
def test_advice_on_data_never_names_what_is_there_already(change, says, is_silent_on):
    train, _, _ = data.digits(batch_size=128)
    advice = faster_data(as_loader(change(train), name="train"))
    assert says in advice
    assert is_silent_on not in advice


@pytest.mark.parametrize("steps_per_call", [1, "auto"])
@pytest.mark.slow
def test_how_steps_are_fused_is_in_the_log_and_not_shown(capsys, steps_per_call):
    train, val, _ = data.digits(batch_size=256)
    trainer = tasks.Classifier(zoo.MLP((8, 10)), steps_per_call=steps_per_call)
    result = trainer.train_model(train, val, num_epochs=3)
    shown, logged = capsys.readouterr().out, (result.path / "log.txt").read_text()
    assert "step fusion" in logged
    assert not any(word in shown for word in ("fusion", "per call", "estimated"))
    assert "compiled in" in shown
    assert shown.count("* best model so far") == 1
    first = next(n for n, line in enumerate(shown.splitlines()) if line.endswith(" *"))
    assert shown.splitlines()[first + 1] == "* best model so far"


def test_the_live_line_gets_the_metrics_of_a_window_and_the_learning_rate(monkeypatch):
    shown: list[dict[str, float]] = []
    monkeypatch.setattr("distaff.run.recorder._PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(PlainDisplay, "update", lambda self, metrics: shown.append(dict(metrics)))
    train, _, _ = data.digits(batch_size=256)
    optimizer = OptimizerConfig("sgd", learning_rate=0.5, schedule="constant")
    trainer = tasks.Classifier(zoo.MLP((8, 10)), optimizer=optimizer, log_every_n_steps=2)
    result = trainer.train_model(train, num_epochs=1)
    assert [each["step/learning_rate"] for each in shown] == [0.5] * 2
    assert [each["step/loss"] for each in shown] == result.history["step/loss"].tolist()


def test_speed_below_ten_keeps_its_digits():
    slow = Throughput(3, 6, {**dict.fromkeys(PARTS, 0.0), "device": 9.0}, 0, 0)
    assert Report(slow).lines()[0].startswith("speed  0.33 steps/s, 0.67 examples/s, 3e+03 ms")


def test_report_of_a_run_without_steps_divides_by_nothing():
    report = Report(Throughput(0, 0, dict.fromkeys(PARTS, 0.0), 0, 0), Flops(1.0, False), 1.0)
    assert report.lines()[0] == "speed  0 steps/s, 0 examples/s, 0 ms per step"
    assert report.facts()["share_of_peak"] == 0


def test_facts_are_strict_json():
    facts = Report(read(device=8), Flops(2e6, at_least=False), 4e9).facts()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert (facts["steps_per_second"], facts["examples_per_second"]) == (500, 8000)
    assert facts["seconds_per_step"]["device"] == 0.002
    assert (facts["flops_per_step"], facts["share_of_peak"]) == (2e6, 0.25)
    empty = Report(read(device=8)).facts()
    assert (empty["flops_per_step"], empty["share_of_peak"]) == (None, None)


@pytest.mark.parametrize(
    ("seconds", "known", "asked"),
    [
        *((9.9, True, []), (10, True, ["flops", False]), (101, True, ["flops", True])),
        (10, False, ["flops"]),
    ],
)
def test_flops_and_peak_are_asked_for_where_the_run_was_worth_it(seconds, known, asked):
    calls: list[Any] = []

    def flops() -> Flops | None:
        calls.append("flops")
        return Flops(1.0, at_least=False) if known else None

    def peak(again: bool) -> float:
        calls.append(again)
        return 2.0

    report = make_report(read(device=seconds, compile=1000), flops, peak)
    assert calls == asked
    assert (report.peak == 2.0) == (len(asked) == 2)


@pytest.mark.parametrize("tune_process", [True, False])
def test_run_that_was_worth_it_reports_its_share_of_the_peak(monkeypatch, capsys, tune_process):
    monkeypatch.setattr("distaff.run.report._WORTH_SECONDS", 0.0)
    monkeypatch.setattr("distaff.run.recorder.peak_flops", lambda again: 1e12)
    train, _, _ = data.digits(batch_size=128)
    trainer = tasks.Classifier(zoo.MLP((8, 10)), tune_process=tune_process)
    result = trainer.train_model(train, num_epochs=1)
    facts = json.loads((result.path / "status.json").read_text())["throughput"]
    products = 2 * 128 * (64 * 8 + 8 * 10)  # of the forward pass; the backward pass has 1 to 2 more
    assert 2 * products < facts["flops_per_step"] < 5 * products
    assert facts["flops_are_at_least"] is False
    assert facts["peak_flops_per_second"] == (1e12 if tune_process else None)
    said = "measured for float32 matrix products"
    shown, logged = capsys.readouterr().out, (result.path / "log.txt").read_text()
    assert (said in shown, said in logged) == (tune_process, tune_process)
    assert "FLOP per step" in shown


@pytest.mark.slow
def test_debugged_run_has_no_flops(monkeypatch):
    monkeypatch.setattr("distaff.run.report._WORTH_SECONDS", 0.0)
    train, _, _ = data.digits(batch_size=512)
    options = {"debug": True, "root": None, "enable_progress_bar": False, "tune_process": False}
    trainer = tasks.Classifier(zoo.MLP((8, 10)), **options)
    trainer.train_model(train, num_epochs=1)
    assert trainer.last_run.report is not None
    assert trainer.last_run.report.flops is None

from __future__ import annotations

import contextlib
import io
import math
import re
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from distaff.run.display import NullDisplay, PlainDisplay, TerminalDisplay, make_display
from distaff.run.display.lines import EpochLine, fit, live_fields, number
from distaff.run.display.pace import Pace

METRICS = {"train/loss": 0.25, "train/accuracy": 0.9, "val/loss": 0.5, "val/accuracy": 0.8}


class FakeClock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def terminal(monkeypatch) -> FakeTerminal:
    monkeypatch.setenv("TERM", "xterm")
    return FakeTerminal()


def terminal_display(terminal: FakeTerminal, clock: FakeClock, width: int = 80) -> TerminalDisplay:
    return TerminalDisplay(Console(file=terminal, width=width, color_system=None), clock=clock)


def last_frame(display: TerminalDisplay, terminal: FakeTerminal) -> str:
    """Returns what the bar says at the end: closing a live display draws it once more."""
    terminal.truncate(terminal.seek(0))
    display.close()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())


def assert_no_thread_is_left() -> None:
    """Looks for the thread that redraws; other tests may have left threads of their own."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("rich"):
            thread.join(timeout=5)
            assert not thread.is_alive()


@settings(deadline=None)
@given(st.floats(width=32))
def test_number_has_six_characters_and_the_value(value):
    text = number(value)
    assert len(text) == 6
    if 1e-3 <= abs(value) < 1e4:
        assert float(text) == pytest.approx(value, rel=1e-3, abs=5.1e-4)
    else:
        assert float(text) == pytest.approx(value, rel=0.5, nan_ok=True)


def test_epoch_text_leaves_out_rate_seconds_and_step_as_the_width_shrinks():
    lines = [
        EpochLine(3, 20, 60, METRICS, 0.82, True).text(3, 1234.0, width) for width in (118, 100)
    ]
    assert lines == [
        "epoch  3/20  step  60  train loss 0.2500 accuracy 0.9000  "
        "val loss 0.5000 accuracy 0.8000   0.8 s    1234 examples/s *",
        "epoch  3/20  step  60  train loss 0.2500 accuracy 0.9000  "
        "val loss 0.5000 accuracy 0.8000   0.8 s *",
    ]
    assert EpochLine(3, 20, 60, METRICS, 0.82, True).text(3, 1234.0, 80) == (
        "epoch  3/20 train loss 0.2500 accuracy 0.9000 val loss 0.5000 accuracy 0.8000 *"
    )


def test_epoch_text_keeps_its_columns_through_a_run():
    diverged = {"train/loss": math.nan, "train/accuracy": 0.0, "val/loss": 1e9, "val/accuracy": 0.1}
    first = EpochLine(1, 20, 3, METRICS, 99.94, True).text(3, 7.0, None)
    last = EpochLine(20, 20, 460, diverged, 1234.0, True).text(3, 123456.0, None)
    assert len(first) == len(last)


def test_plain_display_rates_training_without_compilation_and_evaluation(clock):
    stream = io.StringIO()
    display = PlainDisplay(stream, clock=clock)
    display.start(20, 23)
    display.compiling("the train step")
    clock.seconds += 50
    display.running()
    clock.seconds += 2
    display.advance(1, 1, 64)
    display.update({"train/loss": 1.0})
    for _ in display.track(range(3), "validating", 3):
        clock.seconds += 10
        display.compiling("the eval step")
        display.running()
    assert stream.getvalue() == ""
    display.epoch_line(EpochLine(1, 20, 1, {"train/loss": 0.25}, 82.0, False))
    clock.seconds += 1
    display.advance(2, 2, 64)
    display.epoch_line(EpochLine(2, 20, 2, {"train/loss": 0.125}, 1.0, True))
    assert stream.getvalue() == (
        "epoch  1/20  step   1  train loss 0.2500  82.0 s      32 examples/s\n"
        "epoch  2/20  step   2  train loss 0.1250   1.0 s      64 examples/s *\n"
    )


def test_plain_display_prints_a_line_every_thirty_seconds_of_a_long_epoch(clock):
    stream = io.StringIO()
    display = PlainDisplay(stream, clock=clock)
    display.start(2, 100)
    display.compiling("the train step")
    clock.seconds += 90
    display.running()
    display.advance(1, 1, 0)
    display.update({"step/loss": 0.25, "step/accuracy": 0.5, "step/learning_rate": 1e-3})
    for step in range(2, 63):  # a second each
        clock.seconds += 1
        display.advance(step, 1, 64)
    line = "loss 0.2500  accuracy 0.5000  lr 0.0010      64 examples/s"
    assert stream.getvalue().splitlines() == [
        f"epoch 1/2  step  31/200  {line}  2:49 left",
        f"epoch 1/2  step  61/200  {line}  2:19 left",
    ]
    display.epoch_line(EpochLine(1, 2, 62, {}, 61.0, False))
    clock.seconds += 29
    display.advance(63, 2, 64)
    assert len(stream.getvalue().splitlines()) == 3  # a line restarts the thirty seconds


def test_plain_display_prints_a_line_every_thirty_seconds_of_a_long_evaluation(clock):
    stream = io.StringIO()
    display = PlainDisplay(stream, clock=clock)
    for _ in display.track(range(8), "val", 8):
        clock.seconds += 10
    assert stream.getvalue().splitlines() == ["val 3/8", "val 6/8"]


def test_live_fields_keep_the_first_metric_and_one_learning_rate():
    metrics = {"step/loss": 0.25, "step/learning_rate/head": 1e-3, "step/learning_rate/body": 1e-5}
    assert live_fields(metrics) == [(0, "loss 0.2500"), (1, "lr 0.0010")]
    many = live_fields(
        {"step/loss": 0.25, "step/psnr/y": 1.0, "step/b": 2.0, "step/learning_rate": 0.5}
    )
    fields = [(0, "epoch"), *many]
    assert fit(fields, width=60) == "epoch  loss 0.2500  psnr/y 1.0000  b 2.0000  lr 0.5000"
    assert fit(fields, width=50) == "epoch  loss 0.2500  psnr/y 1.0000  lr 0.5000"
    assert fit(fields, width=30) == "epoch  loss 0.2500  lr 0.5000"
    assert fit(fields, width=20) == "epoch  loss 0.2500"


def test_terminal_display_drops_metrics_before_the_rates_on_a_narrow_terminal(terminal, clock):
    display = terminal_display(terminal, clock, width=64)
    display.start(20, 23)
    display.advance(1, 1, 64)
    display.update({"step/loss": 0.25, "step/accuracy": 0.5, "step/learning_rate": 1e-3})
    numbers = last_frame(display, terminal).splitlines()[1]
    assert numbers == "epoch  1/20  step   1/460  loss 0.2500  lr 0.0010"


def test_plain_display_forgets_the_time_between_two_trainings(clock):
    stream = io.StringIO()
    display = PlainDisplay(stream, clock=clock)
    for _ in range(2):
        display.start(1, 1)
        clock.seconds += 2
        display.advance(1, 1, 64)
        display.epoch_line(EpochLine(1, 1, 1, {}, 2.0, False))
        display.close()
        clock.seconds += 1000
    assert stream.getvalue() == "epoch 1/1  step 1   2.0 s      32 examples/s\n" * 2


def test_plain_display_writes_no_control_characters(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    display = PlainDisplay(stream)
    display.start(2, None)
    display.epoch_line(EpochLine(1, 2, 5, METRICS, 1.0, True))
    styled = Table("path", style="bold red")
    styled.add_row("[link=file:///tmp]params[/link]")
    display.print(styled)
    display.print("params[0]: [64, 128]")
    display.table({"test": {"loss": 0.5}})
    display.close()
    assert "params[0]: [64, 128]\n" in stream.getvalue()
    assert all(char == "\n" or char.isprintable() for char in stream.getvalue())


def test_table_has_a_column_per_split_and_a_dash_where_a_metric_is_missing():
    stream = io.StringIO()
    rows = {"train": {"loss": 0.25, "accuracy": 0.9}, "test": {"test/loss": 0.5, "test/f1": 0.1}}
    PlainDisplay(stream).table(rows)
    assert [line.split() for line in stream.getvalue().splitlines()] == [
        ["train", "test"],
        ["loss", "0.2500", "0.5000"],
        ["accuracy", "0.9000", "-"],
        ["f1", "-", "0.1000"],
    ]


def test_terminal_display_shows_what_compiles_and_for_how_long(terminal, clock):
    display = terminal_display(terminal, clock)
    display.start(20, 23)
    display.compiling("the train step")
    clock.seconds += 3
    assert "compiling the train step 3 s" in last_frame(display, terminal)


def test_terminal_display_shows_position_metrics_rate_and_time_left(terminal, clock):
    display = terminal_display(terminal, clock)
    display.start(20, 23)
    display.compiling("the train step")
    clock.seconds += 60
    display.running()
    display.advance(1, 1, 0)
    clock.seconds += 20
    display.advance(41, 2, 40 * 64)
    display.compiling("the eval step")
    clock.seconds += 30
    display.running()
    display.update({"train/loss": 0.25, "train/accuracy": 0.9})
    bar, numbers = last_frame(display, terminal).splitlines()[:2]
    assert bar.split() == ["━" * 4 + "─" * 40, "3:29", "left"]
    assert numbers == ("epoch  2/20  step  41/460  loss 0.2500  accuracy 0.9000     128 examples/s")


def test_terminal_display_counts_the_time_left_of_a_resumed_run_from_where_it_began(
    terminal, clock
):
    display = terminal_display(terminal, clock)
    display.start(10, 100)
    display.advance(900, 10, 0)
    clock.seconds += 10
    display.advance(910, 10, 640)
    assert "1:30 left" in last_frame(display, terminal)


def test_terminal_display_shows_no_time_left_without_a_number_of_steps(terminal, clock):
    display = terminal_display(terminal, clock)
    display.start(4, None)
    display.advance(1, 3, 64)
    clock.seconds += 10
    display.advance(2, 3, 64)
    frame = last_frame(display, terminal)
    assert "left" not in frame
    assert "epoch 3/4  step      2" in frame
    assert frame.count("━") == frame.count("─")


def test_terminal_display_tracks_an_evaluation_within_a_training(terminal, clock):
    display = terminal_display(terminal, clock)
    display.start(4, 10)
    batches = display.track("abc", "validating", 3)
    assert [next(batches), next(batches)] == ["a", "b"]
    assert "validating 1/3" in last_frame(display, terminal)


def test_terminal_display_tracks_a_prediction_alone_and_cleans_up(terminal, clock):
    display = terminal_display(terminal, clock)
    assert list(display.track("abc", "predicting", 3)) == ["a", "b", "c"]
    assert_no_thread_is_left()
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")


def test_terminal_display_gives_the_terminal_back_after_an_error(terminal, clock):
    stdout = sys.stdout
    display = terminal_display(terminal, clock)

    def fail_while_training():
        with contextlib.closing(display):
            display.start(2, 2)
            display.advance(1, 1, 64)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_while_training()
    display.close()
    assert sys.stdout is stdout
    assert_no_thread_is_left()
    assert terminal.getvalue().endswith("\x1b[2K")
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")


def test_terminal_display_prints_lines_as_wide_as_the_terminal(terminal, clock):
    display = terminal_display(terminal, clock, width=80)
    display.epoch_line(EpochLine(1, 20, 23, METRICS, 0.5, False))
    display.print("[b]not markup[/b] " + "x" * 100)
    line, text = terminal.getvalue().splitlines()
    assert line == "epoch  1/20 train loss 0.2500 accuracy 0.9000 val loss 0.5000 accuracy 0.8000"
    assert text == "[b]not markup[/b] " + "x" * 100


def test_pace_forgets_what_lies_before_its_window(clock):
    pace = Pace(clock, window_seconds=5.0)
    for examples in [1] * 20 + [100] * 6:
        clock.seconds += 1
        pace.examples += examples
        rate = pace.recent()
    assert rate == 100
    assert pace.lap() == pytest.approx(620 / 26)


def test_null_display_draws_nothing_and_yields_everything(capsys):
    display = make_display(False)
    display.start(1, 1)
    display.print("text")
    display.epoch_line(EpochLine(1, 1, 1, METRICS, 1.0, True))
    display.table({"test": {"loss": 0.5}})
    assert list(display.track([1, 2], "testing")) == [1, 2]
    display.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("stream", "term", "kind"),
    [
        (FakeTerminal(), "xterm", TerminalDisplay),
        (FakeTerminal(), "dumb", PlainDisplay),
        (io.StringIO(), "xterm", PlainDisplay),
    ],
)
def test_make_display_draws_a_bar_only_where_the_cursor_can_move(monkeypatch, stream, term, kind):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert type(make_display(True, stream)) is kind
    assert type(make_display(False, stream)) is NullDisplay

"""The history of a run: what was recorded, as arrays and as pictures."""

from __future__ import annotations

import json
import logging
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distaff import History
from distaff.core import optional
from distaff.errors import MetricError, MissingExtraError, RunDirectoryError, UnknownNameError
from distaff.loggers import history as history_module
from distaff.loggers import svg
from distaff.loggers.history import ColumnLogger
from line import Line, loader, trained
from scripted import Break, InterruptError

SVG = "{http://www.w3.org/2000/svg}"
CURVES = "figures/learning_curves.svg"


def columns_of(path: Path) -> dict[str, list[tuple[int, int, Any]]]:
    """Returns `(step, epoch, value)` by name, read without any of the package."""
    found: dict[str, list[tuple[int, int, Any]]] = {}
    for line in map(json.loads, (path / "metrics.jsonl").read_text().splitlines()):
        for name in line.keys() - {"step", "epoch", "time"}:
            found.setdefault(name, []).append((line["step"], line["epoch"], line[name]))
    return found


def texts(drawing: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(drawing).iter(f"{SVG}text")]


def polylines(drawing: str) -> list[list[tuple[float, float]]]:
    lines = [each.attrib["points"] for each in ET.fromstring(drawing).iter(f"{SVG}polyline")]
    return [[tuple(map(float, point.split(","))) for point in line.split()] for line in lines]


def test_history_has_what_the_log_has():
    run = trained(Line)
    history, logged = run.result.history, columns_of(run.result.path)
    assert set(history) == set(logged) >= {"train/loss", "val/loss", "test/loss", "step/loss"}
    for name, rows in logged.items():
        found = zip(history.steps[name], history.epochs[name], history[name], strict=True)
        assert [tuple(each) for each in found] == rows
    assert history["val/loss"].dtype == np.float64
    assert history == History.read(run.result.path)


def test_history_without_a_directory_is_the_same_and_starts_with_its_run():
    run, other = trained(Line), trained(Line, root=None)
    assert run.result.history == other.result.history
    assert len(other.result.history["val/loss"]) == 2
    again = other.trainer.train_model(loader(), loader(), num_epochs=1)
    assert again.history.epochs["val/loss"].tolist() == [2]  # after the best epoch, the first
    assert len(other.result.history["val/loss"]) == 2


@pytest.mark.parametrize("root", ["runs", None])
@pytest.mark.slow
def test_history_differs_where_one_value_differs(root):
    one, other = trained(Line, root=root), trained(Line, x=loader().arrays["x"] + 1, root=root)
    assert one.result.history != other.result.history
    assert one.result.history != {}


@pytest.mark.parametrize("step", [2, 5])
@pytest.mark.slow
def test_history_is_complete_after_a_resume(step):
    whole = trained(Line, name="whole").result
    with pytest.raises(InterruptError):
        trained(Line, callbacks=[Break(step)])
    resumed = trained(Line, callbacks=[Break(None)]).result
    assert resumed.history.epochs["val/loss"].tolist() == [1, 2]
    assert resumed.history == whole.history


def test_history_drops_what_a_rollback_does_again():
    logger = ColumnLogger()
    for step in (1, 2):
        logger.log_metrics({"train/loss": step}, step=step, epoch=step)
    place = logger.position()
    logger.log_metrics({"train/loss": 3, "val/loss": 4}, step=2, epoch=3)  # after the checkpoint
    logger.resume(2, place)
    assert dict(History(logger).steps)["train/loss"].tolist() == [1, 2]
    assert len(History(logger)["val/loss"]) == 0
    logger.resume(1)
    assert History(logger)["train/loss"].tolist() == [1]


def test_history_takes_arrays_and_numbers_that_are_not_finite(tmp_path):
    lines = [
        {"val/loss": "nan", "val/recall": [0.5, 0.25]},
        {"val/loss": 1.5, "val/recall": [0.5, "inf"]},
    ]
    rows = [{"step": n, "epoch": n, "time": 0.0, **line} for n, line in enumerate(lines, 1)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 3, "ep')  # as a killed run leaves it
    history = History.read(tmp_path)
    np.testing.assert_array_equal(history["val/loss"], [np.nan, 1.5])
    np.testing.assert_array_equal(history["val/recall"], [[0.5, 0.25], [0.5, np.inf]])
    assert polylines(history.svg()) == []
    assert "val/recall" not in history.curves()[0]


def test_history_keeps_what_a_log_file_would_not_take_out_of_memory():
    logger = ColumnLogger()
    logger.log_metrics({"step/population": np.zeros(3), "step/loss": 1.0}, step=1, epoch=1)
    logger.log_metrics({"val/loss": "text"}, step=1, epoch=1)  # ty: ignore[invalid-argument-type]
    assert list(History(logger)) == ["step/loss"]


def test_history_names_the_nearest_metric_and_a_missing_directory(tmp_path):
    run = trained(Line)
    with pytest.raises(KeyError, match="Did you mean 'val/loss'"):
        run.result.history["val/los"]
    with pytest.raises(RunDirectoryError, match="no run directory"):
        History.read(tmp_path / "elsewhere")
    with pytest.raises(UnknownNameError, match=r"result\.history"):
        run.result.logs  # ty: ignore[unresolved-attribute]  # noqa: B018


def test_title_names_run_seed_and_examples():
    run = trained(Line, seed=7)
    title = "line/0001: seed 7, train 16 examples, val 16 examples"
    assert run.result.history.title == title
    assert title in texts((run.result.path / CURVES).read_text())
    unwritten = trained(Line, root=None, name="", limit_batches=2)
    assert unwritten.result.history.title == "Line: seed 42, train 16 examples, val 2 batches"


def test_figure_has_the_title_and_a_panel_per_metric():
    figure = trained(Line).result.figure()
    assert figure.get_suptitle().startswith("line/0001: seed 42")
    assert [axes.get_title() for axes in figure.axes] == ["loss"]


def test_figure_without_matplotlib_names_the_extra(monkeypatch):
    def missing(name: str, *, extra: str) -> Any:
        raise MissingExtraError(f'pip install "distaff[{extra}]"')

    result = trained(Line).result
    monkeypatch.setattr(optional, "load", missing)
    with pytest.raises(MissingExtraError, match=r"distaff\[plots\]"):
        result.figure()
    assert result.history.svg().startswith("<svg")


def test_figure_of_nothing_says_so():
    with pytest.raises(MetricError, match="at least one recorded epoch"):
        History(ColumnLogger()).figure()


def test_a_run_of_few_epochs_is_drawn_over_its_steps():
    history = trained(Line).result.history  # two epochs of four steps
    curves, label, best = history.curves()
    assert (label, best, set(curves)) == ("step", None, {"step/loss", "val/loss"})
    assert [x for x, _ in curves["step/loss"]] == [2, 4, 6, 8]
    assert [x for x, _ in curves["val/loss"]] == [4, 8]
    trainer = Line()
    longer = trainer.train_model(loader(), loader(), num_epochs=3).history
    curves, label, best = longer.curves()
    assert (label, best, set(curves)) == ("epoch", 1, {"train/loss", "val/loss"})


def test_every_run_draws_its_curves_unless_it_is_told_not_to():
    assert CURVES in trained(Line).files
    assert "figures" not in trained(Line, save_curves=False).files
    with pytest.raises(InterruptError):
        trained(Line, name="broken", callbacks=[Break(7)])
    assert Path("runs/broken/0001", CURVES).exists()  # of its first epoch


def test_a_drawing_that_fails_ends_no_run(monkeypatch, caplog):
    def broken(*args: Any, **options: Any) -> str:
        raise ZeroDivisionError("no room")

    monkeypatch.setattr(history_module.svg, "learning_curves", broken)
    with caplog.at_level(logging.WARNING):
        run = trained(Line)
    assert run.result.status == "finished"
    assert CURVES not in run.files
    assert "cannot be drawn: ZeroDivisionError: no room" in caplog.text


def test_svg_places_points_where_their_values_are():
    drawing = svg.learning_curves({"val/loss": [(1, 0.0), (2, 1.0), (3, 0.5)]}, title="<a & b>")
    (line,) = polylines(drawing)
    xs, ys = zip(*line, strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[1] < ys[2] < ys[0]  # pixels count from the top
    assert ys[0] - ys[2] == pytest.approx(ys[2] - ys[1], abs=0.2)
    assert {"<a & b>", "loss", "val", "epoch", "1", "2", "3", "0.5"} <= set(texts(drawing))


def test_svg_has_a_logarithmic_axis_for_a_loss_that_falls_far():
    (line,) = polylines(svg.learning_curves({"train/loss": [(1, 10.0), (2, 1.0), (3, 0.1)]}))
    ys = [y for _, y in line]
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.2)
    (line,) = polylines(svg.learning_curves({"train/accuracy": [(1, 0.01), (2, 0.5), (3, 0.99)]}))
    ys = [y for _, y in line]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)


def test_svg_breaks_lines_at_values_that_are_not_finite():
    values = [1.0, 2.0, math.nan, 4.0, 3.0, math.inf]
    drawing = svg.learning_curves({"val/loss": list(enumerate(values))})
    assert [len(line) for line in polylines(drawing)] == [2, 2]
    nothing = svg.learning_curves({"val/loss": [(1, math.nan)]})
    assert "no finite value" in texts(nothing)


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-12, 1e12, 5.0])
def test_svg_draws_a_single_value_of_any_size(value):
    drawing = svg.learning_curves({"val/loss": [(1, value)]}, best=1)
    (circle,) = ET.fromstring(drawing).iter(f"{SVG}circle")
    assert 0 < float(circle.attrib["cx"]) < 340
    assert 0 < float(circle.attrib["cy"]) < 210


def test_svg_of_many_points_stays_small_and_ends_with_the_last_one():
    series = [(n, math.sin(n / 1e3)) for n in range(10**4)]
    drawing = svg.learning_curves({"step/loss": series}, x_label="step")
    (line,) = polylines(drawing)
    assert 300 < len(line) <= 402
    (short,) = polylines(svg.learning_curves({"step/loss": [series[0], series[-1]]}))
    assert line[-1][0] == short[-1][0]

"""The study goes on where it was left, tests its best model, and draws Optuna's pictures."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
import pytest


@pytest.fixture(autouse=True)
def no_window():
    with mpl.rc_context({"backend": "agg"}):
        yield


@pytest.mark.slow
def test_tuning_draws_and_goes_on(example, tmp_path: Path, capsys, monkeypatch) -> None:
    module = example("tuning")
    options = module.Options(num_trials=3, num_epochs=2, root=str(tmp_path))
    result = module.main(options)
    monkeypatch.setattr(module, "draw", lambda *_: None)
    assert module.main(options).trials == result.trials
    assert [trial.path for trial in result.trials] == [
        tmp_path / "tuning" / version for version in ("0001", "0002", "0003")
    ]
    model = json.loads((result.trials[0].path / "config.json").read_text())["model"]
    assert (model["dropout"], model["batch_norm"]) == (0.2, True)
    assert set(result.best.values) == set(module.SPACE)
    pictures = sorted((tmp_path / "tuning").glob("*.png"))
    names = ["contour.png", "intermediate_values.png", "param_importances.png"]
    assert [picture.name for picture in pictures] == names
    assert all(picture.stat().st_size > 5_000 for picture in pictures)
    printed = f"test/accuracy={result.metrics['test/accuracy']:.4f}"
    assert capsys.readouterr().out.strip().endswith(printed)
    assert result.metrics["test/accuracy"] > 0.5

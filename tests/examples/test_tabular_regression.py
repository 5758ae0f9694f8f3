"""The network explains more of the disease's progression than a line does."""

from __future__ import annotations

from pathlib import Path

import pytest
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression

from distaff import data


@pytest.mark.slow
def test_tabular_regression_beats_a_linear_model(example, tmp_path: Path, capsys) -> None:
    scores = example("tabular_regression").main(root=str(tmp_path))  # R2 0.350, MAE 42.2 measured
    train, _, test = data.split(load_diabetes(return_X_y=True), (0.7, 0.15, 0.15), seed=0)
    assert scores["R2"] > LinearRegression().fit(*train).score(*test)  # 0.316
    assert scores["MAE"] < 46
    assert f"66 test patients: R2 {scores['R2']:.3f}" in capsys.readouterr().out

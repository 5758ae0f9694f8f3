"""The folds are those of scikit-learn, and the network is nearly as good as a linear model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import KFold, cross_val_score


@pytest.mark.slow
def test_folds_are_nearly_as_good_as_a_linear_model(example, tmp_path: Path, capsys) -> None:
    module = example("diabetes_folds")
    options = module.Options(num_epochs=15, num_folds=2, root=str(tmp_path))
    errors = module.main(options)
    x, y = module.rows()
    folds = KFold(2, shuffle=True, random_state=0)
    linear = -cross_val_score(
        LinearRegression(), x, y, cv=folds, scoring="neg_mean_squared_error"
    ).mean()
    assert np.mean(errors) < 1.2 * linear < 0.65 * y.var()
    assert module.main(options) == errors  # loaded
    assert sorted(each.name for each in (tmp_path / "diabetes").iterdir()) == ["0001", "0002"]
    assert f"2 folds: {np.mean(errors):.3f}" in capsys.readouterr().out

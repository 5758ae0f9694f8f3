"""The sine is learned, each seed in a run of its own, with its picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest


@pytest.mark.slow
def test_sine_regression_learns_from_exact_points(example, tmp_path: Path, capsys) -> None:
    module = example("sine_regression")
    options = module.Options(num_epochs=15, seeds=(0, 1), root=str(tmp_path))
    errors = module.main(options)
    assert list(errors) == [0, 1]
    records = [json.loads(path.read_text()) for path in sorted(tmp_path.rglob("config.json"))]
    assert [record["options"]["seed"] for record in records] == [0, 1]
    # The variance of the targets, which a constant would reach, is 0.5.
    assert max(errors.values()) < 0.02
    assert f"1: '{errors[1]:.2e}'" in capsys.readouterr().out
    pictures = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    assert pictures == ["sine/0001/sine.png", "sine/0002/sine.png"]


def test_sine_regression_has_the_published_points(example) -> None:
    module = example("sine_regression")
    train, val, test = (
        module.points(n, seed)["x"] for n, seed in ((1000, 42), (200, 43), (500, 44))
    )
    assert [len(x) for x in (train, val, test)] == [1000, 200, 500]
    assert not set(train[:, 0]) & set(test[:, 0])
    for x in (train, val, test):
        assert -2 <= x.min() < -1.9
        assert 1.9 < x.max() <= 2
    points = module.points(10, 0)
    np.testing.assert_array_equal(points["y"], np.sin(3 * points["x"]))

"""The loaded model prices new frames nearly as well as their noise allows."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pandas")


@pytest.mark.slow
def test_frames_are_priced_by_the_loaded_model(example, tmp_path: Path, capsys) -> None:
    module = example("frames")
    new = module.flats(200, seed=1)
    base = 2 * new["area"] + 10 * new["rooms"]
    noise = new["price"] - base * new["city"].map(module.FACTORS)
    best = 1 - noise.var() / new["price"].var()
    score = module.main(root=str(tmp_path))
    assert best - 0.01 < score < best + 0.005  # 0.989 of 0.991 measured
    assert f"R2 {score:.4f} of 200 new flats" in capsys.readouterr().out

"""The suggested learning rate trains well, and the curve is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.slow
def test_finder_suggests_a_rate_that_trains_well(example, tmp_path: Path, capsys) -> None:
    accuracy = example("finder").main(root=str(tmp_path))  # 0.969 and 0.917 measured
    assert accuracy["suggested"] > 0.95
    assert accuracy["suggested"] > accuracy["a tenth"]
    assert (tmp_path / "finder" / "learning_rate.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "RangeTest(suggestion 0.0" in printed
    assert "batch size" in printed

"""One call accumulates, computes in bfloat16, clips, averages, and logs the norms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.mark.slow
def test_big_batches_reach_their_accuracy_and_log_norms(example, tmp_path: Path, capsys) -> None:
    result = example("big_batches").main(root=str(tmp_path))  # 0.964 and 0.967 measured
    assert result.metrics["test/accuracy"] > 0.94
    assert result.metrics["test_ema/accuracy"] > 0.94
    norms = result.history["step/grad_norm"]
    assert len(norms) == 90  # of 30 epochs
    assert np.isfinite(norms).all()
    assert norms[-10:].mean() < norms[:10].mean() / 2
    printed = capsys.readouterr().out
    assert "Products in bfloat16: 2 of 2 forward, 3 of 3 backward" in printed
    assert f"test_ema/accuracy {result.metrics['test_ema/accuracy']:.4f}" in printed

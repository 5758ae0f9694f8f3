"""Class weights find eights that a training without them misses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.mark.slow
def test_class_weights_find_the_rare_digit(example, tmp_path: Path, capsys) -> None:
    module = example("imbalanced_digits")
    found = module.main(root=str(tmp_path))  # 0.876, and 0.286 of the eights, measured
    assert found["balanced_accuracy"] > 0.85
    assert found["recall"][module.RARE] > 0.2
    assert found["balanced_accuracy"] == pytest.approx(np.mean(found["recall"]))
    plain = module.main(balanced=False, root=str(tmp_path))
    assert plain["recall"][module.RARE] == 0
    assert plain["balanced_accuracy"] < found["balanced_accuracy"]
    assert f"of the rare digit {found['recall'][8]:.3f}" in capsys.readouterr().out

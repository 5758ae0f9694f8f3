"""The characters of a passage tell its package far more often than the largest class would."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.slow
def test_text_classification_beats_the_largest_class(example, tmp_path: Path, capsys) -> None:
    found = example("text_classification").main(root=str(tmp_path))  # 0.912, 0.891 measured
    assert found["accuracy"] > 0.88
    assert found["accuracy"] > found["largest class"] + 0.3
    assert found["balanced"] > 0.8
    assert f"largest class {found['largest class']:.3f}" in capsys.readouterr().out


def test_passages_are_ascii_codes_of_one_length(example) -> None:
    module = example("text_classification")
    for package in module.PACKAGES:
        codes = module.passages(package)
        assert codes.shape[1] == module.LENGTH
        assert len(codes) > 500
        assert codes.min() >= 0
        assert codes.max() < 128

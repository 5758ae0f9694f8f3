"""The example trains with and without, shifts by a pixel, and prints what it returns."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest


@pytest.mark.slow
def test_augmentation_compares_both_on_the_test_digits(example, tmp_path: Path, capsys) -> None:
    module = example("augmentation")
    small = {"num_examples": 100, "num_epochs": 10, "seeds": (3,), "root": str(tmp_path)}
    scores = module.main(module.Options(**small))
    printed = capsys.readouterr().out
    assert list(scores) == ["plain", "shifted"]
    for name, (score,) in scores.items():
        assert score > 0.3
        assert f"{name:7} {score:.4f} {score:.4f}\n" in printed
    assert scores["plain"] != scores["shifted"]


def test_augmentation_shifts_a_digit_by_at_most_a_pixel(example) -> None:
    shifted = object.__new__(example("augmentation").Shifted)
    dot = np.zeros((200, 8, 8, 1), np.float32)
    dot[:, 4, 4] = 1
    moved = shifted.augment({"image": dot, "label": np.zeros(200)}, jax.random.key(0))["image"]
    seen = np.argwhere(np.asarray(moved)[..., 0].any(axis=0))
    assert seen.min() == 3
    assert seen.max() == 5

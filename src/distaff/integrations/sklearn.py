"""scikit-learn: its dataset of handwritten digits, and its splitters for cross-validation."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn import model_selection
from sklearn.datasets import load_digits


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns the handwritten digits of `sklearn.datasets.load_digits`.

    Returns:
        `(images, labels)`: float32 `[1797, 8, 8, 1]` in [0, 1] and int32 `[1797]` in 0..9.
    """
    bunch = load_digits()
    return (bunch.images[..., None] / 16).astype(np.float32), bunch.target.astype(np.int32)


def folds(
    count: int, k: int, seed: int, *, stratify: np.ndarray | None, groups: np.ndarray | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the rows of the training and the validation part of each fold.

    Args:
        count: number of examples.
        k: number of folds.
        seed: seed of the shuffling.
        stratify: the class of each example `[count]`, or None.
        groups: the group of each example `[count]`, or None.

    Raises:
        ValueError: there are too few examples, or too few of a class or group.
    """
    kinds: dict[tuple[bool, bool], Any] = {
        (False, False): model_selection.KFold,
        (True, False): model_selection.StratifiedKFold,
        (False, True): model_selection.GroupKFold,
        (True, True): model_selection.StratifiedGroupKFold,
    }
    splitter = kinds[stratify is not None, groups is not None](k, shuffle=True, random_state=seed)
    return list(splitter.split(np.zeros(count), stratify, groups))

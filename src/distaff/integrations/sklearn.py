"""scikit-learn: its dataset of handwritten digits."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns the handwritten digits of `sklearn.datasets.load_digits`.

    Returns:
        `(images, labels)`: float32 `[1797, 8, 8, 1]` in [0, 1] and int32 `[1797]` in 0..9.
    """
    bunch = load_digits()
    return (bunch.images[..., None] / 16).astype(np.float32), bunch.target.astype(np.int32)

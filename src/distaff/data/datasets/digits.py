"""Handwritten digits, a dataset that needs no download."""

from __future__ import annotations

from distaff.core import optional
from distaff.data.arrays import ArrayLoader
from distaff.data.datasets.published import tenths


def digits(batch_size: int = 64, seed: int = 0) -> tuple[ArrayLoader, ArrayLoader, ArrayLoader]:
    """Returns loaders over 1,797 handwritten digits, scanned in 8 x 8 pixels.

    The split is the same for every seed, machine and version: 1,257 examples to train, 180 to
    validate, 360 to test, each with an equal share of every digit. Source: E. Alpaydin and
    C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998,
    https://doi.org/10.24432/C50P49 (its test part, as scikit-learn ships it).

    Args:
        batch_size: examples in a batch.
        seed: seed of the order of the training examples only.

    Returns:
        `(train, val, test)`. A batch is `{"image": float32 [batch, 8, 8, 1] in [0, 1],
        "label": int32 [batch] in 0..9}`. Only `train` is shuffled and drops a short last batch.

    Raises:
        BatchError: `batch_size` is larger than the training set.
        ConfigError: `batch_size` or `seed` is not an integer, or out of range.
        MissingExtraError: scikit-learn is not installed.
    """
    images, labels = optional.load("sklearn", extra="digits").digits()
    tenth = tenths(labels)
    is_val, is_test = tenth == 2, (tenth == 0) | (tenth == 5)
    train, val, test = (
        {"image": images[rows], "label": labels[rows]}
        for rows in (~(is_val | is_test), is_val, is_test)
    )
    return (
        ArrayLoader(train, batch_size, shuffle=True, seed=seed),
        ArrayLoader(val, batch_size),
        ArrayLoader(test, batch_size),
    )

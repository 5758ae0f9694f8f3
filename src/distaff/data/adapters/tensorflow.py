"""TensorFlow's datasets as loaders, for users who have TensorFlow: nothing of it is imported."""

from __future__ import annotations

from typing import Any

from distaff.data.stream import Stream


def tensorflow_loader(dataset: Any) -> Stream:
    """Returns a loader over a `tf.data.Dataset` of batches; one iteration is one epoch.

    It is read again up to a position, which is verified: give `shuffle` a seed.

    Args:
        dataset: the dataset, after `.batch(...)`.
    """
    cardinality = int(dataset.cardinality())  # -1 is endless, -2 is unknown
    return Stream(dataset.as_numpy_iterator, length=cardinality if cardinality >= 0 else None)

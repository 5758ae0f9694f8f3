"""Reads the binary version of CIFAR-10 and CIFAR-100: records of labels and a picture.

A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009,
https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version".
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from distaff.core.paths import as_path
from distaff.data.datasets.published import opened
from distaff.errors import DataFileError

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
_MAX_RECORDS = 50_000  # in the largest published file, CIFAR-100's train.bin
_MAX_NAMES_BYTES = 1 << 16


def read_cifar10(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """Reads one file of CIFAR-10, such as `data_batch_1.bin`.

    Args:
        path: the file: records of a label and 3,072 pixels, one byte each.

    Returns:
        `(images, labels)`: uint8 `[n, 32, 32, 3]`, red, green and blue; int32 `[n]` in 0..9.

    Raises:
        DataFileError: the file cannot be read, or has another format.
    """
    images, labels = _records(as_path(path, "path"), {"label": 10})
    return images, labels[0]


def read_cifar100(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads one file of CIFAR-100, `train.bin` or `test.bin`.

    Args:
        path: the file: records of a coarse label, a fine label and 3,072 pixels, one byte each.

    Returns:
        `(images, fine, coarse)`: uint8 `[n, 32, 32, 3]`, red, green and blue; int32 `[n]` in
        0..99, the class; int32 `[n]` in 0..19, its superclass of five classes.

    Raises:
        DataFileError: the file cannot be read, or has another format.
    """
    images, (coarse, fine) = _records(
        as_path(path, "path"), {"coarse label": 20, "fine label": 100}
    )
    return images, fine, coarse


def read_class_names(path: str | os.PathLike[str], classes: int) -> tuple[str, ...]:
    """Reads the names of the classes, one per line, in the order of their labels."""
    with opened(as_path(path, "path")) as (file, _):
        text = file.read(_MAX_NAMES_BYTES).decode("ascii", errors="replace")
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if len(names) != classes or not all(name.isprintable() and name.isascii() for name in names):
        raise DataFileError(
            f"{path} must hold the names of {classes} classes, one per line, in ASCII; got "
            f"{len(names)} lines. Download the file again."
        )
    return names


def _records(path: Path, labels: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns pictures, uint8 `[n, 32, 32, 3]`, and labels, int32 `[len(labels), n]`.

    `labels` has the number of classes of each label by its name.
    """
    record_bytes = len(labels) + _PIXELS
    with opened(path) as (file, file_bytes):
        count, rest = divmod(file_bytes, record_bytes)
        if rest or not 1 <= count <= _MAX_RECORDS:
            raise DataFileError(
                f"{path} must hold 1 to {_MAX_RECORDS:,} records of {record_bytes:,} bytes; it "
                f"has {file_bytes:,} bytes, {count:,} records and {rest:,} bytes. "
                "Download the file again; only the binary version can be read."
            )
        content = file.read(count * record_bytes)
    if len(content) != count * record_bytes:
        raise DataFileError(
            f"{path} must not change while it is read; got {len(content):,} of "
            f"{count * record_bytes:,} bytes. Read it again."
        )
    records = np.frombuffer(content, np.uint8).reshape(count, record_bytes)
    columns = records[:, : len(labels)].T.astype(np.int32)
    for (name, classes), column in zip(labels.items(), columns, strict=True):
        wrong = np.flatnonzero(column >= classes)
        if len(wrong):
            raise DataFileError(
                f"Each {name} in {path} must be in 0..{classes - 1}; record {wrong[0]} has "
                f"{column[wrong[0]]}. The file is another one, or damaged: download it again."
            )
    planes = records[:, len(labels) :].reshape(count, 3, _SIDE, _SIDE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), columns

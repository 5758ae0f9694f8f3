"""MNIST and CIFAR, read from their published files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

import numpy as np

from distaff.core.typing import Batch
from distaff.data.arrays import ArrayLoader
from distaff.data.datasets.cifar import read_cifar10, read_cifar100, read_class_names
from distaff.data.datasets.idx import read_idx
from distaff.data.datasets.published import Published, find, tenths
from distaff.data.wrappers.mapped import MappedLoader
from distaff.errors import DataFileError

Folder: TypeAlias = str | os.PathLike[str]
Loaders: TypeAlias = tuple[MappedLoader, MappedLoader, MappedLoader]

_MNIST_SIDE = 28
_CIFAR_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


def _idx_names(stem: str, axes: int) -> tuple[str, ...]:
    """Returns the common names of a file of MNIST; some tools replace a dash by a dot."""
    names = (f"{stem}-idx{axes}-ubyte", f"{stem}.idx{axes}-ubyte")
    return tuple(name + suffix for name in names for suffix in ("", ".gz"))


_MNIST = Published(
    "MNIST",
    tuple(
        _idx_names(f"{split}-{kind}", axes)
        for split in ("train", "t10k")
        for kind, axes in (("images", 3), ("labels", 1))
    ),
    "Download the four .gz files (11.6 MB in total) from http://yann.lecun.com/exdb/mnist/ or its "
    "mirror https://github.com/cvdfoundation/mnist, and put them into {folder}, compressed or not. "
    "Fashion-MNIST (31 MB) has files of the same names, at "
    "https://github.com/zalandoresearch/fashion-mnist.",
)
_CIFAR10 = Published(
    "CIFAR-10",
    (*((f"data_batch_{part}.bin",) for part in range(1, 6)), ("test_batch.bin",)),
    f"Download the binary version, cifar-10-binary.tar.gz (162 MB), from {_CIFAR_PAGE}, and unpack "
    "it: tar -xzf cifar-10-binary.tar.gz -C {folder}",
    pickled="data_batch_1",
)
_CIFAR100 = Published(
    "CIFAR-100",
    (("train.bin",), ("test.bin",)),
    f"Download the binary version, cifar-100-binary.tar.gz (161 MB), from {_CIFAR_PAGE}, and "
    "unpack it: tar -xzf cifar-100-binary.tar.gz -C {folder}",
    pickled="meta",
)


def mnist(folder: Folder, batch_size: int = 64, seed: int = 0) -> Loaders:
    """Returns loaders over MNIST, or Fashion-MNIST: 60,000 and 10,000 grey pictures, ten classes.

    Nothing is downloaded. The split is the same for every seed, machine and version: of the
    training files, 54,000 examples are for training, and 6,000, a tenth of each class, for
    validation; the 10,000 of the test files are for testing. Pictures are stored in bytes, 55 MB in
    total, and scaled per batch. Sources: Y. LeCun et al., Proceedings of the IEEE 86, 1998,
    http://yann.lecun.com/exdb/mnist/; H. Xiao et al. 2017, arXiv:1708.07747.

    Args:
        folder: folder of the four files, `train-images-idx3-ubyte` and so on, with or without
            `.gz`; or its parent folder.
        batch_size: examples in a batch.
        seed: seed of the order of the training examples only.

    Returns:
        `(train, val, test)`. A batch is `{"image": float32 [batch, 28, 28, 1] in [0, 1],
        "label": int32 [batch] in 0..9}`. Only `train` is shuffled and drops a short last batch.

    Raises:
        BatchError: `batch_size` is larger than the training set.
        ConfigError: `batch_size` or `seed` is not an integer, or out of range.
        DataFileError: a file is missing, has another format, or does not match the others.
    """
    train_images, train_labels, test_images, test_labels = find(folder, _MNIST)
    train = _read_mnist(train_images, train_labels)
    return _loaders(train, _read_mnist(test_images, test_labels), batch_size, seed)


def cifar10(folder: Folder, batch_size: int = 64, seed: int = 0) -> Loaders:
    """Returns loaders over CIFAR-10: 50,000 and 10,000 colour pictures, ten classes.

    Nothing is downloaded. The split is the same for every seed, machine and version: of the
    training files, 45,000 examples are for training, and 5,000, a tenth of each class, for
    validation; the 10,000 of the test file are for testing. Pictures are stored in bytes, 184 MB in
    total instead of 737, and scaled per batch; reading temporarily takes 470 MB. Source:
    A. Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html.

    Args:
        folder: `cifar-10-batches-bin` of the unpacked binary version, or its parent folder.
        batch_size: examples in a batch.
        seed: seed of the order of the training examples only.

    Returns:
        `(train, val, test)`. A batch is `{"image": float32 [batch, 32, 32, 3] in [0, 1],
        "label": int32 [batch] in 0..9}`. Only `train` is shuffled and drops a short last batch.

    Raises:
        BatchError: `batch_size` is larger than the training set.
        ConfigError: `batch_size` or `seed` is not an integer, or out of range.
        DataFileError: a file is missing, or has another format. The Python version, which consists
            of pickles, is not read.
    """
    *parts, test = (read_cifar10(path) for path in find(folder, _CIFAR10))
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    splits = [{"image": image, "label": label} for image, label in ((images, labels), test)]
    return _loaders(splits[0], splits[1], batch_size, seed)


def cifar100(folder: Folder, batch_size: int = 64, seed: int = 0) -> Loaders:
    """Returns loaders over CIFAR-100, like `cifar10`, with 100 classes in 20 superclasses.

    Args:
        folder: `cifar-100-binary` of the unpacked binary version, or its parent folder.
        batch_size: examples in a batch.
        seed: seed of the order of the training examples only.

    Returns:
        `(train, val, test)`. A batch is `{"image": float32 [batch, 32, 32, 3] in [0, 1],
        "label": int32 [batch] in 0..99, "coarse_label": int32 [batch] in 0..19}`. Only `train` is
        shuffled and drops a short last batch.

    Raises:
        BatchError: `batch_size` is larger than the training set.
        ConfigError: `batch_size` or `seed` is not an integer, or out of range.
        DataFileError: see `cifar10`.
    """
    names = ("image", "label", "coarse_label")
    train, test = (
        dict(zip(names, read_cifar100(path), strict=True)) for path in find(folder, _CIFAR100)
    )
    return _loaders(train, test, batch_size, seed)


def cifar10_names(folder: Folder) -> tuple[str, ...]:
    """Returns the names of CIFAR-10's ten classes, in the order of their labels.

    Args:
        folder: see `cifar10`.

    Raises:
        DataFileError: `batches.meta.txt` or another file is missing, or has another format.
    """
    (*_, names) = find(folder, _with_names(_CIFAR10, "batches.meta.txt"))
    return read_class_names(names, 10)


def cifar100_names(folder: Folder) -> tuple[str, ...]:
    """Returns the names of CIFAR-100's hundred classes, in the order of their labels.

    Args:
        folder: see `cifar100`.

    Raises:
        DataFileError: `fine_label_names.txt` or another file is missing, or has another format.
    """
    (*_, names) = find(folder, _with_names(_CIFAR100, "fine_label_names.txt"))
    return read_class_names(names, 100)


def _with_names(source: Published, name: str) -> Published:
    return source._replace(files=(*source.files, (name,)))


def _read_mnist(images_path: Path, labels_path: Path) -> dict[str, np.ndarray]:
    images, labels = read_idx(images_path), read_idx(labels_path)
    side = _MNIST_SIDE
    if images.dtype != np.uint8 or images.shape[1:] != (side, side):
        raise DataFileError(
            f"{images_path} must hold pictures of {side} x {side} pixels, uint8 [n, {side}, "
            f"{side}]; it holds {images.dtype} {list(images.shape)}. The file is another one: "
            "download it again."
        )
    if labels.dtype != np.uint8 or labels.shape != (len(images),):
        raise DataFileError(
            f"{labels_path} must hold a label for each of the {len(images):,} pictures of "
            f"{images_path.name}, uint8 [{len(images)}]; it holds {labels.dtype} "
            f"{list(labels.shape)}. The two files do not match: download both again."
        )
    if labels.max() > 9:
        row = int(np.argmax(labels > 9))
        raise DataFileError(
            f"Each label in {labels_path} must be in 0..9; label {row} is {labels[row]}. The file "
            "is another one, or damaged: download it again."
        )
    return {"image": images[..., None], "label": labels.astype(np.int32)}


def _loaders(
    train: dict[str, np.ndarray], test: dict[str, np.ndarray], batch_size: int, seed: int
) -> Loaders:
    is_val = tenths(train["label"]) == 0
    fitted, val = (
        {name: array[rows] for name, array in train.items()} for rows in (~is_val, is_val)
    )
    return (
        MappedLoader(ArrayLoader(fitted, batch_size, shuffle=True, seed=seed), _scaled),
        MappedLoader(ArrayLoader(val, batch_size), _scaled),
        MappedLoader(ArrayLoader(test, batch_size), _scaled),
    )


def _scaled(batch: Batch) -> Batch:
    return {**batch, "image": batch["image"].astype(np.float32) / np.float32(255)}

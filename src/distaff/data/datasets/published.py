"""Finds the files of published datasets, and splits their examples."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from distaff.core.paths import as_path
from distaff.errors import DataFileError


class Published(NamedTuple):
    """A published dataset.

    Attributes:
        name: name of the dataset, such as `CIFAR-10`.
        files: possible names of each file, the usual one first.
        remedy: instructions to download and unpack the files, with their size.
        pickled: name of a file that only the pickled version has, which is never read.
    """

    name: str
    files: tuple[tuple[str, ...], ...]
    remedy: str
    pickled: str = ""


def find(folder: str | os.PathLike[str], source: Published) -> list[Path]:
    """Returns the paths of a dataset's files in `folder`, or in one of its folders.

    Raises:
        DataFileError: files are missing, or several folders contain them.
    """
    folder = as_path(folder, "folder")
    found = {place: _files_in(place, source) for place in _places(folder)}
    whole = [place for place, files in found.items() if None not in files]
    if len(whole) > 1 and whole[0] != folder:
        raise DataFileError(
            f"Only one folder in {folder} may hold the files of {source.name}; found them in "
            f"{[place.name for place in whole]}. Pass one of these folders."
        )
    if not whole:
        raise _missing(folder, source, found)
    return [path for path in found[whole[0]] if path is not None]


@contextmanager
def opened(path: Path) -> Generator[tuple[BinaryIO, int]]:
    """Opens a file, and yields it with its size in bytes; turns OSError into DataFileError."""
    try:
        with path.open("rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataFileError(
            f"A file of a dataset must be readable; {path} is not: {error}. "
            "Check its permissions, or download it again."
        ) from error


def _places(folder: Path) -> list[Path]:
    try:
        return [folder, *sorted(child for child in folder.iterdir() if os.path.isdir(child))]
    except OSError:
        return [folder]  # the caller reports the missing files


def _files_in(place: Path, source: Published) -> list[Path | None]:
    found = []
    for names in source.files:
        paths = (place / name for name in names)
        found.append(next((path for path in paths if os.path.isfile(path)), None))
    return found


def _missing(
    folder: Path, source: Published, found: dict[Path, list[Path | None]]
) -> DataFileError:
    """Returns an error that names the files missing in the most complete folder."""
    place = min(found, key=lambda place: found[place].count(None))
    names = [names[0] for names, path in zip(source.files, found[place], strict=True) if not path]
    state = (
        f"{place} has no {', '.join(names)}" if os.path.isdir(folder) else "there is no such folder"
    )
    pickled = [
        place for place in found if source.pickled and os.path.isfile(place / source.pickled)
    ]
    if pickled:
        state += (
            f", and {pickled[0]} holds the Python version, which is not read since loading its "
            "pickles can run arbitrary code"
        )
    return DataFileError(
        f"The published files of {source.name} must be in {folder}, or in a folder in it; "
        f"{state}. {source.remedy.format(folder=folder)}"
    )


def tenths(labels: np.ndarray) -> np.ndarray:
    """Returns the part in 0..9 of each example, int `[n]`, with an equal share of every class."""
    # NumPy guarantees the numbers of RandomState in all versions, but not of default_rng.
    shuffled = np.random.RandomState(0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    parts = np.empty(len(labels), int)
    parts[by_class] = np.arange(len(labels)) % 10
    return parts

"""Published data sets: which files they are, where to get them, and where they lie."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from distaff.core.paths import as_path
from distaff.errors import DataFileError


class Published(NamedTuple):
    """A data set as it is published.

    Attributes:
        name: such as `CIFAR-10`.
        files: for each file its names, the usual one first.
        remedy: what to get, from where, how large it is, and how to unpack it.
        pickled: the name of a file that only the version in pickles has, which is never read.
    """

    name: str
    files: tuple[tuple[str, ...], ...]
    remedy: str
    pickled: str = ""


def find(folder: str | os.PathLike[str], source: Published) -> list[Path]:
    """Returns the files of a data set, which lie in a folder, or in one of the folders in it.

    Args:
        folder: where to look.
        source: what to look for.

    Returns:
        The paths, in the order of `source.files`.

    Raises:
        DataFileError: files are missing, or several folders have them.
    """
    folder = as_path(folder, "folder")
    found = {place: _files_in(place, source) for place in _places(folder)}
    whole = [place for place, files in found.items() if None not in files]
    if len(whole) > 1 and whole[0] != folder:
        raise DataFileError(
            f"The files of {source.name} must be in one of the folders of {folder}; they are in "
            f"{[place.name for place in whole]}. Give one of these folders."
        )
    if not whole:
        raise _missing(folder, source, found)
    return [path for path in found[whole[0]] if path is not None]


@contextmanager
def opened(path: Path) -> Generator[tuple[BinaryIO, int]]:
    """Opens a file for reading, and yields it with its number of bytes.

    Raises:
        DataFileError: it cannot be opened or read.
    """
    try:
        with path.open("rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataFileError(
            f"A file of a data set must be readable; {path} is not: {error}. "
            "Check its permissions, or get it again."
        ) from error


def _places(folder: Path) -> list[Path]:
    try:
        return [folder, *sorted(child for child in folder.iterdir() if os.path.isdir(child))]
    except OSError:
        return [folder]  # of which the caller says what is missing


def _files_in(place: Path, source: Published) -> list[Path | None]:
    found = []
    for names in source.files:
        paths = (place / name for name in names)
        found.append(next((path for path in paths if os.path.isfile(path)), None))
    return found


def _missing(
    folder: Path, source: Published, found: dict[Path, list[Path | None]]
) -> DataFileError:
    """Returns the error for the place where the fewest files are missing."""
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
            f", and {pickled[0]} holds the Python version: pickles, which can run any code when "
            "they are read, and are refused"
        )
    return DataFileError(
        f"The published files of {source.name} must be in {folder}, or in a folder in it; "
        f"{state}. {source.remedy.format(folder=folder)}"
    )

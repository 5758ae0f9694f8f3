"""Finds files of examples, larger than memory, and reads their blocks."""

from __future__ import annotations

import glob
import os
import re
import zlib
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from distaff.core.paths import as_path
from distaff.data.datasets.published import opened
from distaff.data.examples.examples import BlockExamples, Examples
from distaff.errors import DataFileError

Paths: TypeAlias = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
"""A file, a glob pattern, or several of them. The files of a pattern are sorted by name."""

_COMPRESSED = {
    rb"\x1f\x8b\x08": "gunzip",
    rb"\x28\xb5\x2f\xfd": "unzstd",
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": "bunzip2",  # magic of the first block, or of an empty file
    rb"\xfd7zXZ\x00": "unxz",
}
"""First bytes of compressed files, as regular expressions, and the commands to unpack them."""


class DataFile(NamedTuple):
    """A file, and its size in bytes when it was found."""

    path: Path
    num_bytes: int

    def read(self, start: int, stop: int) -> bytes:
        """Returns the bytes from `start` to `stop`, or raises DataFileError."""
        with opened(self.path) as (file, _):
            file.seek(start)
            return file.read(stop - start)

    def changed(self, what: str) -> DataFileError:
        """Returns the error for a file that has changed since it was found."""
        return DataFileError(
            f"A file must not change while it is read; {self.path} has changed: {what}. "
            "Create the examples again, and do not modify their files."
        )


class FileBlock(NamedTuple):
    """A part of a file, with `size` examples, that is read at once.

    `start` and `stop` are in bytes, or in another unit of the format.
    """

    start: int
    stop: int
    size: int


class BlockPlace(NamedTuple):
    """The place of a block.

    Attributes:
        file: index of its file, in which it goes from `start` to `stop`.
        first: index of its first example in the file.
    """

    file: int
    start: int
    stop: int
    first: int


class FileExamples(BlockExamples):
    """Examples in files; `blocks` has the blocks of each file, and each block lies in one file."""

    def __init__(
        self,
        files: Sequence[DataFile],
        blocks: Iterable[Iterable[FileBlock]],
        *,
        blocks_in_memory: int,
    ) -> None:
        self.files = files
        tables = [np.array(list(each), np.int64).reshape(-1, 3) for each in blocks]
        self._file_starts = np.concatenate([[0], np.cumsum([len(table) for table in tables])])
        self._blocks = np.concatenate(tables)
        self.fingerprint = zlib.crc32(np.array([file.num_bytes for file in files], "<i8").tobytes())
        super().__init__(self._blocks[:, 2], blocks_in_memory=blocks_in_memory)

    def read_block(self, block: int) -> Examples:
        start, stop, size = self._blocks[block].tolist()
        file = int(np.searchsorted(self._file_starts, block, side="right")) - 1
        first = int(self.starts[block] - self.starts[self._file_starts[file]])
        with opened(self.files[file].path) as (_, num_bytes):
            if num_bytes != self.files[file].num_bytes:
                raise self.files[file].changed(f"it now has {num_bytes:,} bytes")
        examples = self.read(BlockPlace(file, start, stop, first))
        if len(examples) != size:
            raise self.files[file].changed(f"{len(examples):,} examples at {start:,} were {size:,}")
        return examples

    @abstractmethod
    def read(self, place: BlockPlace) -> Examples:
        """Reads the examples of a block."""


def find_files(paths: Paths) -> list[DataFile]:
    """Returns the files, in the given order; raises DataFileError if a path matches no file."""
    single = isinstance(paths, str | os.PathLike)
    named = [as_path(path, "A path of data") for path in ([paths] if single else paths)]
    files = [path for name in named for path in _matching(name)]
    if not files:
        raise DataFileError("At least one file is needed; got none. Check the list of paths.")
    return [DataFile(path, path.stat().st_size) for path in files]


def check_uncompressed(file: DataFile) -> None:
    """Raises DataFileError if a file is compressed, and so cannot be read from any position."""
    start = file.read(0, 10)
    for magic, remedy in _COMPRESSED.items():
        if re.match(magic, start):
            raise DataFileError(
                f"A compressed file cannot be read from any position; {file.path} is compressed. "
                f"Unpack it: {remedy} {file.path}"
            )


def _matching(name: Path) -> list[Path]:
    if os.path.isfile(name):
        return [name]
    pattern = str(name)
    is_pattern = glob.has_magic(pattern)
    matches = sorted(glob.glob(pattern, recursive=True)) if is_pattern else []
    if is_pattern and not matches:  # a folder may have [brackets] in its name
        matches = sorted(map(str, name.parent.glob(name.name))) if name.parent.is_dir() else []
    files = [Path(path) for path in matches if os.path.isfile(path)]
    if not files:
        what = "matches no file" if is_pattern else "is not a file"
        raise DataFileError(
            f"A path must be a file, or a glob pattern that matches files; {pattern!r} {what}. "
            "Check the path."
        )
    return files

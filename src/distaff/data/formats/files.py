"""Files of examples, larger than memory: which they are, and where in them each block lies."""

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
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": "bunzip2",  # before the first block, or the end of none
    rb"\xfd7zXZ\x00": "unxz",
}
"""How a compressed file begins, as a regular expression, and what unpacks it."""


class DataFile(NamedTuple):
    """A file, and its size when it was found.

    Attributes:
        path: where it is.
        num_bytes: its size.
    """

    path: Path
    num_bytes: int

    def read(self, start: int, stop: int) -> bytes:
        """Returns the bytes from `start` to `stop`.

        Raises:
            DataFileError: the file cannot be read.
        """
        with opened(self.path) as (file, _):
            file.seek(start)
            return file.read(stop - start)

    def changed(self, what: str) -> DataFileError:
        """Returns the error for a file that is not what it was when it was found."""
        return DataFileError(
            f"A file must stay as it is while it is read; {self.path} has changed: {what}. "
            "Make the examples anew, and leave their files alone."
        )


class FileBlock(NamedTuple):
    """A part of a file that is read whole.

    Attributes:
        start: where it begins, in bytes or in what else the format counts.
        stop: where it ends.
        size: how many examples it has.
    """

    start: int
    stop: int
    size: int


class BlockPlace(NamedTuple):
    """Where a block lies.

    Attributes:
        file: the number of its file.
        start: as a `FileBlock` has it.
        stop: as a `FileBlock` has it.
        first: the number of its first example, among those of the file.
    """

    file: int
    start: int
    stop: int
    first: int


class FileExamples(BlockExamples):
    """Examples of files; each block lies in one file.

    Args:
        files: where they are.
        blocks: of each file, its blocks.
        blocks_in_memory: how many blocks are kept.

    Raises:
        BatchError: there is no example.
        ConfigError: `blocks_in_memory` is no whole number, or less than 1.
    """

    def __init__(
        self,
        files: Sequence[DataFile],
        blocks: Iterable[Iterable[FileBlock]],
        *,
        blocks_in_memory: int,
    ) -> None:
        self.files = files
        tables = [np.array(list(found), np.int64).reshape(-1, 3) for found in blocks]
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
        """Returns the examples of a block."""


def find_files(paths: Paths) -> list[DataFile]:
    """Returns the files, in the order given.

    Raises:
        DataFileError: a file is missing or is none, or no file fits a pattern.
    """
    single = isinstance(paths, str | os.PathLike)
    named = [as_path(path, "A path of data") for path in ([paths] if single else paths)]
    found = [path for name in named for path in _matching(name)]
    if not found:
        raise DataFileError("At least one file must be given; got none. Check the list of paths.")
    return [DataFile(path, path.stat().st_size) for path in found]


def refuse_compressed(file: DataFile) -> None:
    """Raises an error where a file is compressed: none can be read from its middle.

    Raises:
        DataFileError: it is compressed by gzip, Zstandard, bzip2 or xz.
    """
    start = file.read(0, 10)
    for magic, remedy in _COMPRESSED.items():
        if re.match(magic, start):
            raise DataFileError(
                f"A file must be read from any place, which no compressed file can be; {file.path} "
                f"is compressed. Unpack it: {remedy} {file.path}"
            )


def _matching(name: Path) -> list[Path]:
    if os.path.isfile(name):
        return [name]
    pattern = str(name)
    is_pattern = glob.has_magic(pattern)
    found = sorted(glob.glob(pattern, recursive=True)) if is_pattern else []
    if is_pattern and not found:  # a folder may have [brackets] in its name
        found = sorted(map(str, name.parent.glob(name.name))) if name.parent.is_dir() else []
    files = [Path(path) for path in found if os.path.isfile(path)]
    if not files:
        what = "fits no file" if is_pattern else "is no file"
        raise DataFileError(
            f"A path must be that of a file, or a glob pattern that fits some; {pattern!r} {what}. "
            "Check the path."
        )
    return files

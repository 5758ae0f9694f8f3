"""Reads records of ArrayRecord files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from distaff.core import optional
from distaff.core.config.checks import whole
from distaff.data.examples.block_cache import Kept
from distaff.data.formats.files import (
    BlockPlace,
    DataFile,
    FileBlock,
    FileExamples,
    Paths,
    find_files,
)

_OPEN_FILES = 16


class ArrayRecordExamples(FileExamples):
    """The records of ArrayRecord files, as bytes; decode them with `MappedExamples`.

    The format: https://github.com/google/array_record. Memory holds
    `examples_per_block * blocks_in_memory` records, the indices of up to 16 files, and 32 bytes per
    block.

    Args:
        paths: a file, a glob pattern, or several of them.
        examples_per_block: consecutive records read at once. Choose a multiple of the `group_size`
            that the files were written with, to read each group only once.
        blocks_in_memory: number of cached blocks, which a shuffled epoch mixes at a time.

    Raises:
        BatchError: there are no records.
        ConfigError: an option is out of range.
        DataFileError: a file is missing, or not a whole ArrayRecord file; while reading: it has
            changed, or is damaged.
        MissingExtraError: the package `array_record` is not installed.
    """

    def __init__(
        self, paths: Paths, *, examples_per_block: int = 256, blocks_in_memory: int = 16
    ) -> None:
        examples_per_block = whole("examples_per_block", examples_per_block)
        self._open = optional.load("array_record", extra="array-record").Records
        self._opened: Kept[DataFile, Any] = Kept(_OPEN_FILES)
        files = find_files(paths)
        blocks = (self._find_blocks(file, examples_per_block) for file in files)
        super().__init__(files, blocks, blocks_in_memory=blocks_in_memory)

    def read(self, place: BlockPlace) -> Sequence[bytes]:
        return self._records(self.files[place.file]).read(place.start, place.stop)

    def _records(self, file: DataFile) -> Any:
        return self._opened.get(file, self._open)

    def _find_blocks(self, file: DataFile, examples_per_block: int) -> Iterator[FileBlock]:
        num_records = len(self._records(file))
        for start in range(0, num_records, examples_per_block):
            stop = min(start + examples_per_block, num_records)
            yield FileBlock(start, stop, stop - start)

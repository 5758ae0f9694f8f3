"""Reads lines of text files that are larger than memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import AnyStr, BinaryIO

from distaff.core.config.checks import whole
from distaff.data.datasets.published import opened
from distaff.data.formats.files import (
    BlockPlace,
    DataFile,
    FileBlock,
    FileExamples,
    Paths,
    check_uncompressed,
    find_files,
)
from distaff.errors import ConfigError, DataFileError

_MAX_LINE_BYTES = 2**30


class TextLines(FileExamples):
    r"""The lines of text files as examples, without line endings (`\n` or `\r\n`).

    The constructor reads the files once to count their lines. Memory holds the lines of
    `blocks_in_memory` blocks, and 32 bytes per block of the files. A Python str takes about 50
    bytes in addition to its characters.

    Args:
        paths: a file, a glob pattern, or several of them.
        block_bytes: bytes of a file read at once, extended to the end of a line.
        blocks_in_memory: number of cached blocks, which a shuffled epoch mixes at a time.
        encoding: an encoding in which a line feed is one byte, such as `"utf-8"` or `"latin-1"`.
            None to read lines as bytes.

    Raises:
        BatchError: there are no lines.
        ConfigError: an option is out of range.
        DataFileError: a file is missing, compressed, or has a line of more than 1 GiB; while
            reading: it has changed, or is not in that encoding.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a.txt").write_bytes(b"one\ntwo\r\n\nfour")
    ...     lines = TextLines(f"{folder}/*.txt")
    ...     [lines[index] for index in range(len(lines))]
    ['one', 'two', '', 'four']
    """

    def __init__(
        self,
        paths: Paths,
        *,
        block_bytes: int = 2**20,
        blocks_in_memory: int = 16,
        encoding: str | None = "utf-8",
    ) -> None:
        block_bytes = whole("block_bytes", block_bytes)
        if encoding is not None:
            _check_encoding(encoding)
        self._encoding = encoding
        files = find_files(paths)
        blocks = (_count_lines(file, block_bytes) for file in files)
        super().__init__(files, blocks, blocks_in_memory=blocks_in_memory)

    def read(self, place: BlockPlace) -> Sequence[str] | Sequence[bytes]:
        file = self.files[place.file]
        content = file.read(place.start, place.stop)
        if self._encoding is None:
            return _without_last_end(content.replace(b"\r\n", b"\n").split(b"\n"))
        try:
            text = content.decode(self._encoding)
        except UnicodeDecodeError as error:
            line = place.first + content.count(b"\n", 0, error.start) + 1
            raise DataFileError(
                f"The text must be in the encoding {self._encoding!r}; {file.path}, line {line}, "
                f"is not: {error.reason}. Pass the right encoding, or read bytes with "
                "encoding=None."
            ) from error
        return _without_last_end(text.replace("\r\n", "\n").split("\n"))


def _check_encoding(encoding: str) -> None:
    try:
        is_one_byte = "\n".encode(encoding) == b"\n"
    except LookupError:
        is_one_byte = False
    if not is_one_byte:
        raise ConfigError(
            "encoding must be an encoding of Python in which a line feed is one byte; got "
            f"{encoding!r}. Write the files in UTF-8, or read bytes with encoding=None."
        )


def _count_lines(file: DataFile, block_bytes: int) -> Iterator[FileBlock]:
    """Yields the blocks of a file, each of which ends at the end of a line."""
    check_uncompressed(file)
    with opened(file.path) as (stream, _):
        start = 0
        while start < file.num_bytes:
            most = stream.read(block_bytes)
            if not most:
                raise file.changed(f"it ends at {start:,} bytes, and had {file.num_bytes:,}")
            rest = _rest_of_line(stream, file)
            # The rest, or a block without a final line feed at the end of the file, is one line.
            size = most.count(b"\n") + (bool(rest) or not most.endswith(b"\n"))
            stop = start + len(most) + len(rest)
            yield FileBlock(start, stop, size)
            start = stop


def _rest_of_line(stream: BinaryIO, file: DataFile) -> bytes:
    rest = stream.readline(_MAX_LINE_BYTES)
    if len(rest) == _MAX_LINE_BYTES and not rest.endswith(b"\n"):
        raise DataFileError(
            f"A line may have at most {_MAX_LINE_BYTES:,} bytes; {file.path} has a longer one. "
            "Check that it is a text file with line feeds."
        )
    return rest


def _without_last_end(lines: list[AnyStr]) -> list[AnyStr]:
    """Removes the empty line that `split` returns after the last line feed."""
    return lines if lines[-1] else lines[:-1]

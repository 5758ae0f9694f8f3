"""Reads examples of tar archives in the WebDataset format."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from itertools import groupby, islice
from typing import Any, BinaryIO

import numpy as np

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
from distaff.data.formats.tar import Member, read_members
from distaff.errors import DataFileError

_END = bytes(512)


class TarExamples(FileExamples):
    """Examples of tar archives: consecutive files with one name up to the first dot are an example.

    This is the WebDataset format, https://webdataset.github.io/webdataset/: `a/7.jpg` and `a/7.cls`
    are the example `{"__key__": "a/7", "jpg": bytes, "cls": 5}`. Values are decoded by extension:
    `cls`, `cls2`, `class`, `count`, `index`, `inx`, `id` to an int; `txt`, `text`, `transcript` to
    a str; `json`, `jsn` as JSON; `npy` to an array. All other values, such as pictures, are bytes.
    Folders, links, devices, and names without an extension or of the form `__name__` are skipped.

    The constructor reads only the headers. Memory holds the bytes of
    `examples_per_block * blocks_in_memory` examples, and 32 bytes per block of the archives.

    Args:
        paths: a file, a glob pattern, or several of them.
        decode: whether to decode values on access; otherwise all values are bytes.
        examples_per_block: consecutive examples read at once.
        blocks_in_memory: number of cached blocks, which a shuffled epoch mixes at a time.

    Raises:
        BatchError: there are no examples.
        ConfigError: an option is out of range.
        DataFileError: a file is missing, compressed, not a whole tar archive, or has sparse files,
            or an example has two files of one extension; while reading: a file has changed, or a
            value cannot be decoded.
    """

    def __init__(
        self,
        paths: Paths,
        *,
        decode: bool = True,
        examples_per_block: int = 64,
        blocks_in_memory: int = 16,
    ) -> None:
        examples_per_block = whole("examples_per_block", examples_per_block)
        self._decode = decode
        files = find_files(paths)
        blocks = (_find_blocks(file, examples_per_block) for file in files)
        super().__init__(files, blocks, blocks_in_memory=blocks_in_memory)

    def read(self, place: BlockPlace) -> _TarBlock:
        file = self.files[place.file]
        content = file.read(place.start, place.stop) + _END
        groups = list(_groups(file, BytesIO(content), len(content)))
        return _TarBlock(file, content, groups, self._decode)


class _TarBlock:
    """A part of an archive, which decodes its examples on access."""

    def __init__(
        self, file: DataFile, content: bytes, groups: list[dict[str, Member]], decode: bool
    ) -> None:
        self._file, self._content, self._groups, self._decode = file, content, groups, decode

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        group = self._groups[index]
        key, _ = _key_and_extension(next(iter(group.values())).name)
        values = {extension: self._value(extension, member) for extension, member in group.items()}
        return {"__key__": key, **values}

    def _value(self, extension: str, member: Member) -> Any:
        value = self._content[member.start : member.stop]
        decoder = _DECODERS.get(extension.rpartition(".")[2]) if self._decode else None
        if decoder is None:
            return value
        try:
            return decoder(value)
        except Exception as error:  # of many kinds: NumPy's headers are Python literals
            raise DataFileError(
                f"A value must be valid for its extension; {member.name!r} in {self._file.path} is "
                f"not: {error}. Write it again, or read bytes with decode=False."
            ) from error


def _find_blocks(file: DataFile, examples_per_block: int) -> Iterator[FileBlock]:
    check_uncompressed(file)
    with opened(file.path) as (archive, _):
        groups = _groups(file, archive, file.num_bytes)
        while block := [list(group.values()) for group in islice(groups, examples_per_block)]:
            yield FileBlock(block[0][0].header, block[-1][-1].end, len(block))


def _groups(file: DataFile, archive: BinaryIO, num_bytes: int) -> Iterator[dict[str, Member]]:
    """Yields the members of each example, by extension."""
    try:
        named = (
            (*_key_and_extension(member.name), member)
            for member in read_members(archive, num_bytes)
        )
        of_examples = (each for each in named if each[0] and each[1])
        for key, group in groupby(of_examples, lambda each: each[0]):
            yield _by_extension(key, group)
    except ValueError as error:
        raise DataFileError(
            f"{file.path} is not a whole, readable tar archive: {error}. Download it again, or "
            "write it again with tar --format=pax."
        ) from error


def _by_extension(key: str, group: Iterator[tuple[str, str, Member]]) -> dict[str, Member]:
    members: dict[str, Member] = {}
    for _, extension, member in group:
        if extension in members:
            raise ValueError(f"the example {key!r} has two files {extension!r}")
        members[extension] = member
    return members


def _key_and_extension(name: str) -> tuple[str, str]:
    """Splits a name at the first dot after its folders; the key is empty for skipped files."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    is_skipped = not stem or (name.startswith("__") and name.endswith("__"))
    return ("" if is_skipped else folder + slash + stem), extension.lower()


def _array(content: bytes) -> np.ndarray:
    """Reads an `.npy` file; allocates memory only if the size in the header is correct."""
    stream = BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version not in _NPY_HEADERS:
        raise ValueError(f"it is an .npy file of the unsupported version {version}")
    shape, is_fortran, dtype = _NPY_HEADERS[version](stream)
    values = content[stream.tell() :]
    if not dtype.itemsize or len(values) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"it states {dtype} {list(shape)}, and holds {len(values):,} bytes")
    array = np.frombuffer(values, dtype) if values else np.empty(shape, dtype)
    return array.reshape(shape, order="F" if is_fortran else "C").copy()


_NPY_HEADERS: Mapping[tuple[int, int], Callable[[BinaryIO], Any]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_DECODERS: Mapping[str, Callable[[bytes], Any]] = {
    **dict.fromkeys(("cls", "cls2", "class", "count", "index", "inx", "id"), int),
    **dict.fromkeys(("txt", "text", "transcript"), bytes.decode),
    **dict.fromkeys(("json", "jsn"), json.loads),
    "npy": _array,
}
"""Decoders of WebDataset, by the last part of the extension; without pickle."""

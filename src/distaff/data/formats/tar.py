"""Reads the headers of tar archives, which may be hostile.

It supports POSIX.1-1988 (ustar) and POSIX.1-2001 (pax) archives, with GNU's long names:
https://pubs.opengroup.org/onlinepubs/9799919799/utilities/pax.html, "pax Interchange Format", and
https://www.gnu.org/software/tar/manual/html_node/Standard.html. The standard library's `tarfile`
keeps all members in memory, and some of its versions loop forever on negative sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import BinaryIO, NamedTuple

_BLOCK = 512
_PIECE = 2**20
_MAX_EXTENSION_BYTES = 2**20
_FILES = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes
_LONG_NAME, _PAX, _SPARSE = b"L", b"x", b"S"
_EXTENSIONS = (_LONG_NAME, b"K", _PAX, b"g")


class Member(NamedTuple):
    """A regular file of an archive; the offsets are in bytes.

    Attributes:
        name: its path, which is never opened.
        header: offset of its first header; its data are from `start` to `stop`.
        end: offset of the next header.
    """

    name: str
    header: int
    start: int
    stop: int
    end: int


def read_members(archive: BinaryIO, num_bytes: int) -> Iterator[Member]:
    """Yields the regular files of an archive of `num_bytes`; skips folders, links and devices.

    Raises:
        ValueError: it is not a whole tar archive, or holds sparse files.
    """
    first = position = 0
    extended: dict[str, str] = {}
    while header := _header(archive, position, num_bytes):
        kind = header[156:157]
        start = position + _BLOCK
        stop = start + _size(header, kind, extended)
        if stop > num_bytes:
            raise ValueError(f"the member at {first:,} ends at {stop:,} of {num_bytes:,} bytes")
        position = stop + -stop % _BLOCK
        if kind in _EXTENSIONS:
            extended |= _extension(archive, kind, start, stop)
            continue
        if kind == _SPARSE or any(key.startswith("GNU.sparse.") for key in extended):
            raise ValueError(f"the member at {first:,} is a sparse file")
        name = extended.get("path") or _name(header)
        if kind in _FILES and not name.endswith("/"):
            yield Member(name, first, start, stop, position)
        first, extended = position, {}


def _header(archive: BinaryIO, position: int, num_bytes: int) -> bytes | None:
    """Returns a header, or None at the block of zeros that ends the archive."""
    archive.seek(position)
    header = archive.read(_BLOCK)
    if len(header) < _BLOCK:
        raise ValueError(f"it ends at {num_bytes:,} bytes, without the zeros of an archive's end")
    if not any(header):
        _check_end(archive, position)
        return None
    if _octal(header[148:156]) != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        raise ValueError(f"the header at {position:,} has a wrong checksum")
    return header


def _check_end(archive: BinaryIO, position: int) -> None:
    """Raises ValueError if the end of the archive is followed by anything but zeros."""
    while piece := archive.read(_PIECE):
        if piece.strip(b"\0"):
            raise ValueError(
                f"it ends at {position:,}, but more data follow, perhaps a second archive; pass "
                "archives as several files, or join them with tar --concatenate"
            )


def _size(header: bytes, kind: bytes, extended: Mapping[str, str]) -> int:
    if kind in _WITHOUT_DATA:
        return 0
    if "size" in extended and kind not in _EXTENSIONS:
        return _decimal(extended["size"].encode())
    field = header[124:136]
    is_binary = field[0] == 0x80  # 0xff marks a negative number
    size = int.from_bytes(field[1:]) if is_binary else _octal(field)
    if kind in _EXTENSIONS and size > _MAX_EXTENSION_BYTES:
        raise ValueError(f"a header has {size:,} bytes")
    return size


def _extension(archive: BinaryIO, kind: bytes, start: int, stop: int) -> dict[str, str]:
    """Returns the fields of an extended header for the next member, under their names in pax."""
    archive.seek(start)
    content = archive.read(stop - start)
    if kind == _LONG_NAME:
        return {"path": _text(content)}
    return dict(_pax_records(content)) if kind == _PAX else {}


def _pax_records(content: bytes) -> Iterator[tuple[str, str]]:
    """Yields the records `length key=value`, whose length includes the whole record."""
    position = 0
    while position < len(content):
        length, _, _ = content[position : position + 20].partition(b" ")
        stop = position + _decimal(length)
        record = content[position + len(length) + 1 : stop]
        if stop > len(content) or not record.endswith(b"\n"):
            raise ValueError("an extended header is damaged")
        key, _, value = record[:-1].partition(b"=")
        yield _text(key), _text(value)
        position = stop


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _octal(field: bytes) -> int:
    digits = field.partition(b"\0")[0].strip()
    if digits.strip(b"01234567"):
        raise ValueError(f"{field!r} in a header is not an octal number")
    return int(digits or b"0", 8)


def _decimal(digits: bytes) -> int:
    if not digits.isdigit():
        raise ValueError(f"{digits[:20]!r} in a header is not a decimal number")
    return int(digits)

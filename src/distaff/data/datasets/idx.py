"""Reads IDX, the file format of MNIST: a header with dtype and shape, and an array.

Y. LeCun, C. Cortes and C. Burges, http://yann.lecun.com/exdb/mnist/, "File formats".
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from distaff.core.paths import as_path
from distaff.data.datasets.published import opened
from distaff.errors import DataFileError

_DTYPES = {
    0x08: np.dtype("u1"),
    0x09: np.dtype("i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}
_MAX_AXES = 64  # of a NumPy array
_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_MAX_RATIO = 1032  # of DEFLATE: 258 bytes from two bits


def read_idx(path: str | os.PathLike[str], *, max_bytes: int = 2**30) -> np.ndarray:
    """Reads an IDX file, uncompressed or compressed by gzip, independent of its name.

    The header is checked against the size of the file before memory is allocated.

    Args:
        path: the file.
        max_bytes: maximal size of the array, in bytes.

    Returns:
        The array, in the shape in the header; uint8, int8, int16, int32, float32 or float64, in
        native byte order.

    Raises:
        DataFileError: the file cannot be read, is not an IDX file, or its size contradicts its
            header.
    """
    path = as_path(path, "path")
    with opened(path) as (file, file_bytes):
        is_gzip = file.read(2) == _GZIP_MAGIC
        file.seek(0)
        try:
            with gzip.GzipFile(fileobj=file) if is_gzip else file as stream:
                return _read(path, stream, file_bytes, is_gzip, max_bytes)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _error(path, "a whole gzip file", f"{file_bytes:,} bytes: {error}") from error


def _read(
    path: Path, stream: BinaryIO | gzip.GzipFile, file_bytes: int, is_gzip: bool, max_bytes: int
) -> np.ndarray:
    dtype, shape = _header(path, stream)
    header_bytes = 4 + 4 * len(shape)
    array_bytes = math.prod(shape) * dtype.itemsize
    stated = f"{array_bytes:,} bytes for {dtype.newbyteorder('=')} {list(shape)}"
    if array_bytes > max_bytes:
        raise DataFileError(
            f"{path} states {stated}, more than max_bytes={max_bytes:,}. If that is correct, raise "
            "max_bytes; otherwise download the file again."
        )
    if not is_gzip and file_bytes != header_bytes + array_bytes:
        raise _error(path, stated, f"{file_bytes - header_bytes:,} after the header")
    if is_gzip and array_bytes > _GZIP_MAX_RATIO * file_bytes:
        most = f"at most {_GZIP_MAX_RATIO * file_bytes:,} from a gzip file of {file_bytes:,} bytes"
        raise _error(path, stated, most)
    values = stream.read(array_bytes)
    # Reading past the end makes gzip verify its checksum.
    if len(values) != array_bytes or stream.read(1):
        got = f"{len(values):,}" if len(values) < array_bytes else "more"
        raise _error(path, stated, got)
    return np.frombuffer(values, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _header(path: Path, stream: BinaryIO | gzip.GzipFile) -> tuple[np.dtype, tuple[int, ...]]:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _DTYPES:
        codes = ", ".join(f"{code:02x}" for code in _DTYPES)
        expected = f"the bytes 00 00, then one of {codes}, then the number of axes"
        raise _error(path, expected, magic.hex(" ") or "an empty file")
    axes = magic[3]
    if not 1 <= axes <= _MAX_AXES:
        raise _error(path, f"1 to {_MAX_AXES} axes", str(axes))
    sizes = stream.read(4 * axes)
    if len(sizes) < 4 * axes:
        raise _error(path, f"{4 * axes} bytes for the sizes of {axes} axes", str(len(sizes)))
    shape = struct.unpack(f">{axes}I", sizes)
    if 0 in shape:
        raise _error(path, "sizes of at least 1", str(list(shape)))
    return _DTYPES[magic[2]], shape


def _error(path: Path, expected: str, got: str) -> DataFileError:
    return DataFileError(
        f"{path} is not a whole IDX file: expected {expected}; got {got}. Download the file again."
    )

"""safetensors: named arrays in one file, which other frameworks read and write, too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from distaff.errors import CheckpointError

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
}
"""What is both written and read back; the library writes some more, and NumPy reads no float8."""


def forms(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Returns shape and dtype of each array of a file; only its header is read.

    Args:
        path: a regular file.

    Raises:
        CheckpointError: it is no safetensors file, or has an array of another dtype.
    """
    try:
        with safe_open(path, framework="np") as file:
            return {name: _form(name, file.get_slice(name)) for name in list(file.keys())}
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def read(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Returns some arrays of a file.

    Args:
        path: a file whose `forms` have been looked at.
        names: which ones.

    Raises:
        CheckpointError: they cannot be read.
    """
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a file.

    Args:
        path: where.
        arrays: by name.

    Raises:
        CheckpointError: an array is of a dtype that the format lacks.
        OSError: it cannot be written.
    """
    little = {name: _little_endian(array) for name, array in arrays.items()}
    for name, array in little.items():
        if array.dtype not in _DTYPES.values():
            raise CheckpointError(
                f"A safetensors file holds arrays of the dtypes {list(_DTYPES)}; {name!r} is "
                f"{array.dtype}. Convert it, or leave it out with only=..."
            )
    try:
        save_file(little, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read as a safetensors file: {error}. Export it anew, or pass another."
    )


def _form(name: str, part: Any) -> tuple[tuple[int, ...], np.dtype]:
    code = part.get_dtype()
    if code not in _DTYPES:
        raise ValueError(f"{name!r} is of the dtype {code}, none of {', '.join(_DTYPES)}")
    return tuple(part.get_shape()), _DTYPES[code]


def _little_endian(array: np.ndarray) -> np.ndarray:
    """Returns an array as it lies in a file: in one piece, whatever it is a view of."""
    return np.asarray(array, array.dtype.newbyteorder("<"), order="C")

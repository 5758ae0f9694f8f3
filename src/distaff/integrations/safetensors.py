"""safetensors: named arrays in a file, shared with other frameworks."""

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
"""The dtypes that can be both written and read with NumPy, which excludes float8."""


def forms(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Returns shape and dtype of each array of a regular file; reads its header only.

    Raises:
        CheckpointError: it is not a safetensors file, or has an array of another dtype.
    """
    try:
        with safe_open(path, framework="np") as file:
            return {name: _form(name, file.get_slice(name)) for name in list(file.keys())}
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def read(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Returns arrays of a file by name; call `forms` first to check it.

    Raises:
        CheckpointError: the arrays cannot be read.
    """
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def write(
    path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a file of named arrays, with texts by name in its header.

    Raises:
        CheckpointError: the format does not support the dtype of an array.
        OSError: the file cannot be written.
    """
    little = {name: _little_endian(array) for name, array in arrays.items()}
    for name, array in little.items():
        if array.dtype not in _DTYPES.values():
            raise CheckpointError(
                f"A safetensors file supports the dtypes {list(_DTYPES)}; {name!r} is "
                f"{array.dtype}. Convert it, or exclude it with only=..."
            )
    try:
        save_file(little, path, dict(metadata) if metadata else None)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read as a safetensors file: {error}. Export it again, or pass another."
    )


def _form(name: str, part: Any) -> tuple[tuple[int, ...], np.dtype]:
    code = part.get_dtype()
    if code not in _DTYPES:
        raise ValueError(f"{name!r} has dtype {code}; known: {', '.join(_DTYPES)}")
    return tuple(part.get_shape()), _DTYPES[code]


def _little_endian(array: np.ndarray) -> np.ndarray:
    """Returns a contiguous little-endian array, as the file format needs."""
    return np.asarray(array, array.dtype.newbyteorder("<"), order="C")

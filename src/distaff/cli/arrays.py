"""Reads and writes files of arrays by name."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from distaff.errors import ConfigError, DataFileError

OUTPUTS = (".npz", ".npy", ".csv")
"""Endings of the files that can be written."""


def read(path: Path) -> Any:
    """Reads arrays by name from an .npz file, or one array from an .npy file.

    Raises:
        ConfigError: the file has another ending.
        DataFileError: the file is missing or damaged.
    """
    if path.suffix not in (".npz", ".npy"):
        raise ConfigError(f"Data must be an .npz or .npy file; got {str(path)!r}.")
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.ndarray):
                return found
            return {name: found[name] for name in found.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataFileError(
            f"{str(path)!r} cannot be read as arrays: {error}. Write it with numpy.savez."
        ) from error


def write(out: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays `[examples, ...]` by name.

    Raises:
        ConfigError: the file holds a single array only.
        OSError: the file cannot be written.
    """
    if out.suffix == ".npz":
        np.savez(out, allow_pickle=False, **arrays)
        return
    if len(arrays) > 1:
        raise ConfigError(
            f"The model has {len(arrays)} outputs, {list(arrays)}; write them to .npz."
        )
    ((name, array),) = arrays.items()
    if out.suffix == ".npy":
        np.save(out, array, allow_pickle=False)
        return
    columns = array.reshape(len(array), -1)
    heads = [name] if columns.shape[1] == 1 else [f"{name}_{i}" for i in range(columns.shape[1])]
    form = "%d" if array.dtype.kind in "iub" else "%.9g"
    np.savetxt(out, columns, fmt=form, delimiter=",", header=",".join(heads), comments="")

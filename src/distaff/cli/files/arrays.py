"""Reads and writes files of arrays by name."""

from __future__ import annotations

import csv
import secrets
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distaff.core import optional
from distaff.errors import ConfigError, DataFileError

OUTPUTS = (".npz", ".npy", ".csv", ".parquet")
"""Endings of the files that can be written."""


def read(path: Path) -> Any:
    """Reads arrays by name from an .npz file, or one array from an .npy file.

    Raises:
        ConfigError: the file has another ending.
        DataFileError: the file is missing or damaged.
    """
    if path.suffix not in (".npz", ".npy"):
        raise ConfigError(f"Data must be an .npz, .npy, .csv or .parquet file; got {str(path)!r}.")
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


def write(out: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays `[examples, ...]` by name, as a whole file or not at all.

    Raises:
        ConfigError: the format holds a single array only, or two columns would have one name.
        MissingExtraError: the package `pyarrow` is not installed.
        OSError: the file cannot be written.
    """
    if out.suffix == ".npy" and len(arrays) > 1:
        raise ConfigError(
            f"The model has {len(arrays)} outputs, {list(arrays)}; write them to .npz."
        )
    temporary = out.with_name(f".{out.stem}.{secrets.token_hex(4)}.tmp{out.suffix}")
    try:
        if out.suffix == ".npz":
            np.savez(temporary, allow_pickle=False, **arrays)
        elif out.suffix == ".npy":
            np.save(temporary, next(iter(arrays.values())), allow_pickle=False)
        elif out.suffix == ".csv":
            _write_csv(temporary, _columns(arrays))
        else:
            optional.load("arrow", extra="arrow").write_parquet(temporary, _columns(arrays))
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def _columns(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a column per value: `name` of an array `[rows]`, else `name_0`, `name_1`, ..."""
    columns: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        flat = array.reshape(len(array), -1)
        is_one = flat.shape[1] == 1
        for place, values in enumerate(flat.T):
            column = name if is_one else f"{name}_{place}"
            if column in columns:
                raise ConfigError(
                    f"Two outputs of the model would be the column {column!r}. Write them to .npz."
                )
            columns[column] = values if values.dtype.kind in "iubf" else values.astype(np.float32)
    return columns


def _write_csv(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*map(_texts, columns.values()), strict=True))


def _texts(values: np.ndarray) -> list[str]:
    """Returns numbers as texts that are read back as the same numbers."""
    if values.dtype.kind in "iub":
        return [str(int(value)) for value in values]
    digits = 17 if values.dtype.itemsize > 4 else 9
    return [f"{value:.{digits}g}" for value in values.tolist()]

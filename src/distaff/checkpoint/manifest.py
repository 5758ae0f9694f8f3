"""The manifest of a checkpoint: the size and checksum of each file, and the format version.

It is written last, before the folder gets its name. A folder may come from anywhere, so its content
is only compared, and names in it cannot point outside the folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from distaff.core.config import strict_json
from distaff.core.files import write_whole

FORMAT = 1
"""The current format version. Checkpoints of version 0 have no manifest."""

NAME = "distaff_manifest.json"
INFO_FILE = "_CHECKPOINT_METADATA"
FORMAT_KEY = "$format"
"""A key in the info of every checkpoint that has a manifest."""

MAX_JSON_BYTES = 2**25
"""Limit for files that are read whole: an untrusted file may have any size."""
_BLOCK_BYTES = 2**20
_DATA_FOLDER = "d"
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)


def seal(folder: Path, step: int) -> None:
    """Writes the manifest of a folder, syncs it to disk, and removes world-write permissions.

    Args:
        folder: a folder that Orbax has written.
        step: the step of the checkpoint, in case the folder is renamed.

    Raises:
        OSError: it cannot be written.
    """
    files = {}
    for entry, status in _entries(folder):
        entry.chmod(stat.S_IMODE(status.st_mode) & ~stat.S_IWOTH)
        if stat.S_ISREG(status.st_mode):
            with entry.open("rb") as file:
                size, checksum = _size_and_checksum(file)
                os.fsync(file.fileno())
            files[entry.relative_to(folder).as_posix()] = {"size": size, "crc32": checksum}
    manifest = {"format": FORMAT, "step": step, "files": files}
    write_whole(folder / NAME, json.dumps(manifest, indent=1))
    for entry, status in _entries(folder):
        if stat.S_ISDIR(status.st_mode):
            sync_directory(entry)


def sync_directory(folder: Path) -> None:
    """Flushes the entries of a directory to disk, if the file system supports it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def damage(folder: Path, *names: str) -> str | None:
    """Returns a clause on the first damaged, missing or untrusted file of a checkpoint, or None.

    Args:
        folder: the folder of a checkpoint.
        *names: the files to compare with the manifest; all without any.
    """
    try:
        return _untrusted(folder) or _difference(folder, names)
    except (OSError, ValueError, RecursionError) as error:
        return str(error)


def step_in(folder: Path) -> int | None:
    """Returns the step recorded in a checkpoint folder of any name; None without one."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        manifest = _read_json(folder, NAME) if (folder / NAME).exists() else {}
        for content in (manifest, read_info(folder)):
            step = content.get("step")
            if type(step) is int and step >= 0:
                return step
    return None


def read_info(folder: Path) -> dict[str, Any]:
    """Returns the JSON that was saved with the arrays, including `FORMAT_KEY`.

    Raises:
        OSError: the file cannot be read.
        ValueError: its content is invalid.
    """
    info = _read_json(folder, INFO_FILE).get("custom_metadata")
    if not isinstance(info, dict | None):
        raise ValueError(f"{INFO_FILE} holds {type(info).__name__} instead of an info")
    return info or {}


def _entries(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yields the folder and everything in it without following links."""
    yield folder, folder.lstat()
    for parent, folders, files in os.walk(folder, onerror=_raise):
        for name in (*sorted(folders), *sorted(files)):
            entry = Path(parent, name)
            yield entry, entry.lstat()


def _raise(error: OSError) -> None:
    raise error


def _size_and_checksum(file: Any) -> tuple[int, int]:
    """Returns the size and the CRC-32 of an open file."""
    size = checksum = 0
    while block := file.read(_BLOCK_BYTES):
        size, checksum = size + len(block), zlib.crc32(block, checksum)
    return size, checksum


def _untrusted(folder: Path) -> str | None:
    for entry, status in _entries(folder):
        name = entry.relative_to(folder).as_posix()
        if stat.S_ISLNK(status.st_mode):
            return f"{name} is a symbolic link, which a checkpoint must not have"
        if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
            return f"{name} is neither a file nor a folder"
        is_data = entry.parent.name == _DATA_FOLDER
        if stat.S_ISREG(status.st_mode) and not is_data and status.st_size > MAX_JSON_BYTES:
            return f"{name} has {status.st_size} bytes; the limit is {MAX_JSON_BYTES}"
    return None


def _difference(folder: Path, names: tuple[str, ...]) -> str | None:
    has_format = FORMAT_KEY in read_info(folder)
    if not (folder / NAME).exists():
        return f"{NAME} is missing" if has_format else None
    manifest = _read_json(folder, NAME)
    version, files = manifest.get("format"), manifest.get("files")
    if type(version) is int and version > FORMAT:
        return (
            f"its format is {version}, and this version of Distaff reads up to {FORMAT}; update "
            "Distaff, or train again"
        )
    is_manifest = type(version) is int and version > 0 and isinstance(files, dict)
    if not is_manifest or INFO_FILE not in files:
        return f"{NAME} is not a valid manifest"
    for name in names or files:
        if name not in files:
            return f"{NAME} does not list {name}"
        difference = _file_difference(folder, name, files[name])
        if difference is not None:
            return difference
    return None


def _file_difference(folder: Path, name: str, expected: Any) -> str | None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or path.as_posix() != name:
        return f"{NAME} lists {name!r}, which cannot be a file of a checkpoint"
    if not isinstance(expected, dict) or expected.keys() != {"size", "crc32"}:
        return f"{NAME} lacks size or checksum of {name}"
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(folder / name, "rb"))
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} is missing"
        size = os.fstat(file.fileno()).st_size
        if size != expected["size"]:
            return f"{name} has {size} bytes instead of {expected['size']}"
        if _size_and_checksum(file)[1] != expected["crc32"]:
            return f"{name} has changed since it was written: its checksum differs"
    return None


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    with open(folder / name, "rb") as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{name} has more than {MAX_JSON_BYTES} bytes")
    try:
        value = strict_json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds {type(value).__name__} instead of an object")
    return value

"""The manifest of a checkpoint: the size and checksum of each file, and the format's version.

It is written last, before the folder gets its name. A folder may come from anywhere: what is read
here is only compared, and no name in it leads out of the folder.
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

from distaff.core.config import encoding

FORMAT = 1
"""Version of the format that is written. Checkpoints of version 0 have no manifest."""

NAME = "distaff_manifest.json"
INFO_FILE = "_CHECKPOINT_METADATA"
FORMAT_KEY = "$format"
"""Beside the keys of the info: tells that a manifest belongs to the checkpoint."""

MAX_JSON_BYTES = 2**25
"""No larger file is read whole: a stranger's may be of any size."""
_BLOCK_BYTES = 2**20
_DATA_FOLDER = "d"
_FOR_EVERYBODY = stat.S_IWOTH
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)


def seal(folder: Path, step: int) -> None:
    """Writes the manifest of a finished folder, and has all of it reach the disk.

    Nothing in the folder stays writable by everybody, whatever the umask is.

    Args:
        folder: what Orbax has written.
        step: of the checkpoint, which a folder of another name does not tell.

    Raises:
        OSError: it cannot be written.
    """
    files = {}
    for entry, status in _entries(folder):
        entry.chmod(stat.S_IMODE(status.st_mode) & ~_FOR_EVERYBODY)
        if stat.S_ISREG(status.st_mode):
            with entry.open("rb") as file:
                size, checksum = _measured(file)
                os.fsync(file.fileno())
            files[entry.relative_to(folder).as_posix()] = {"size": size, "crc32": checksum}
    text = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1)
    descriptor = os.open(folder / NAME, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o664)
    with open(descriptor, "wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(descriptor)
    for entry, status in _entries(folder):
        if stat.S_ISDIR(status.st_mode):
            sync_directory(entry)


def sync_directory(folder: Path) -> None:
    """Has the names in a folder reach the disk, where the file system can do so.

    Args:
        folder: an existing directory.

    Raises:
        OSError: it cannot be written.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def damage(folder: Path, *names: str) -> str | None:
    """Returns what is wrong with a checkpoint, None where nothing is. Changes nothing.

    Args:
        folder: the folder of a checkpoint.
        *names: the files to compare with the manifest; all of them where none is given.

    Returns:
        Half a sentence that names the first file that is damaged, missing or not to be trusted.
    """
    try:
        return _untrusted(folder) or _difference(folder, names)
    except (OSError, ValueError, RecursionError) as error:
        return str(error)


def step_in(folder: Path) -> int | None:
    """Returns the step that a checkpoint itself tells; None where it tells none.

    Args:
        folder: a checkpoint, under any name.
    """
    with contextlib.suppress(OSError, ValueError, RecursionError):
        sealed = _read_json(folder, NAME) if (folder / NAME).exists() else {}
        for told in (sealed, read_info(folder)):
            step = told.get("step")
            if type(step) is int and step >= 0:
                return step
    return None


def read_info(folder: Path) -> dict[str, Any]:
    """Returns what was saved beside the arrays, with the mark of the format.

    Args:
        folder: the folder of a checkpoint.

    Raises:
        OSError: the file cannot be read.
        ValueError: it does not hold what it should.
    """
    info = _read_json(folder, INFO_FILE).get("custom_metadata")
    if not isinstance(info, dict | None):
        raise ValueError(f"{INFO_FILE} holds no info, but {type(info).__name__}")
    return info or {}


def _entries(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yields the folder and all that is in it; follows no links."""
    yield folder, folder.lstat()
    for parent, folders, files in os.walk(folder, onerror=_raised):
        for name in (*sorted(folders), *sorted(files)):
            entry = Path(parent, name)
            yield entry, entry.lstat()


def _raised(error: OSError) -> None:
    raise error


def _measured(file: Any) -> tuple[int, int]:
    """Returns the size and the CRC-32 of an open file."""
    size = checksum = 0
    while block := file.read(_BLOCK_BYTES):
        size, checksum = size + len(block), zlib.crc32(block, checksum)
    return size, checksum


def _untrusted(folder: Path) -> str | None:
    for entry, status in _entries(folder):
        name = entry.relative_to(folder).as_posix()
        if stat.S_ISLNK(status.st_mode):
            return f"{name} is a symbolic link, and a checkpoint has none"
        if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
            return f"{name} is neither a file nor a folder"
        is_data = entry.parent.name == _DATA_FOLDER
        if stat.S_ISREG(status.st_mode) and not is_data and status.st_size > MAX_JSON_BYTES:
            return f"{name} has {status.st_size} bytes, and may have {MAX_JSON_BYTES}"
    return None


def _difference(folder: Path, names: tuple[str, ...]) -> str | None:
    has_format = FORMAT_KEY in read_info(folder)
    if not (folder / NAME).exists():
        return f"{NAME} is missing" if has_format else None
    manifest = _read_json(folder, NAME)
    version, files = manifest.get("format"), manifest.get("files")
    if type(version) is int and version > FORMAT:
        return (
            f"its format is {version}, and this Distaff reads up to {FORMAT}; update Distaff, or "
            "train anew"
        )
    is_manifest = type(version) is int and version > 0 and isinstance(files, dict)
    if not is_manifest or INFO_FILE not in files:
        return f"{NAME} does not hold what a manifest holds"
    for name in names or files:
        if name not in files:
            return f"{NAME} does not name {name}"
        difference = _file_difference(folder, name, files[name])
        if difference is not None:
            return difference
    return None


def _file_difference(folder: Path, name: str, expected: Any) -> str | None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or path.as_posix() != name:
        return f"{NAME} names {name!r}, which is no file of a checkpoint"
    if not isinstance(expected, dict) or expected.keys() != {"size", "crc32"}:
        return f"{NAME} does not hold size and checksum of {name}"
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(folder / name, "rb"))
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} is missing"
        size = os.fstat(file.fileno()).st_size
        if size != expected["size"]:
            return f"{name} has {size} bytes instead of {expected['size']}"
        if _measured(file)[1] != expected["crc32"]:
            return f"{name} is not as it was written: its checksum differs"
    return None


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    with open(folder / name, "rb") as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{name} has more than {MAX_JSON_BYTES} bytes")
    try:
        value = encoding.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds no object, but {type(value).__name__}")
    return value

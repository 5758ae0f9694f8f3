"""The source of Python's standard library, a text corpus on every machine."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from distaff.core.paths import as_path
from distaff.errors import DataFileError

_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_WRITTEN_BY_THE_BUILD = ("config-", "_sysconfigdata")


def python_source(folder: str | os.PathLike[str] | None = None) -> tuple[bytes, bytes, bytes]:
    """Returns the source of Python's standard library, about 12 MB, split by file.

    Of ten files, eight are for training, one for validation, one for testing. The split is by a
    hash of the path, so a file is in the same part in every version of Python. The text differs
    between versions, so results are only comparable within one.

    It includes all `*.py` files except tests (`test`, `tests`, `idle_test`, which some
    distributions omit), installed packages (`site-packages`, `dist-packages`), files written by the
    build of the interpreter (`config-*`, `_sysconfigdata*`), and unreadable files.

    Args:
        folder: the library's folder; by default that of this interpreter.

    Returns:
        `(train, val, test)`, each the bytes of its files, joined in the order of their paths.

    Raises:
        DataFileError: no source file can be read.
    """
    root = as_path(sysconfig.get_path("stdlib") if folder is None else folder, "folder")
    parts: dict[str, list[bytes]] = {"train": [], "val": [], "test": []}
    for path in sorted(_files(root)):
        try:
            parts[_part(path)].append((root / path).read_bytes())
        except OSError:
            continue
    if not any(parts.values()):
        raise DataFileError(
            f"The source of the standard library must be in {root}, in files *.py; none can be "
            "read. Some distributions ship it in another package, or compiled: pass the folder "
            "of another Python, python_source(folder=...)."
        )
    train, val, test = (b"".join(files) for files in parts.values())
    return train, val, test


def _files(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if _is_source(name)]
        inside = Path(folder).relative_to(root)
        yield from (
            (inside / name).as_posix()
            for name in names
            if name.endswith(".py") and _is_source(name)
        )


def _is_source(name: str) -> bool:
    return name not in _NOT_THE_LIBRARY and not name.startswith(_WRITTEN_BY_THE_BUILD)


def _part(path: str) -> str:
    digest = hashlib.blake2b(path.encode(errors="surrogateescape"), digest_size=8).digest()
    return {0: "test", 1: "val"}.get(int.from_bytes(digest, "big") % 10, "train")

"""Opens the storages of studies: objects, databases and journal files."""

from __future__ import annotations

from pathlib import Path

from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from distaff.core.files import drop_partial_line
from distaff.core.paths import as_path
from distaff.errors import RunDirectoryError


def opened(storage: str | Path | BaseStorage) -> BaseStorage:
    """Returns a storage, given one, its URL, or the path of a journal file.

    Raises:
        RunDirectoryError: it cannot be opened.
    """
    if isinstance(storage, BaseStorage):
        return storage
    is_url = isinstance(storage, str) and "://" in storage
    try:
        return _database(str(storage)) if is_url else _journal(as_path(storage, "storage"))
    except Exception as error:  # each database has its own exceptions
        place = str(storage).rpartition("@")[2]  # without a password
        raise RunDirectoryError(
            f"The storage of a study must be possible to open; {place!r} cannot: "
            f"{str(error).splitlines()[0]}. Check the path, or choose another storage."
        ) from error


def _database(url: str) -> BaseStorage:
    if url.startswith("sqlite:///"):
        file, mark, options = url.removeprefix("sqlite:///").partition("?")
        if file.startswith("~"):
            url = f"sqlite:///{as_path(file, 'storage')}{mark}{options}"
        as_path(file, "storage").parent.mkdir(parents=True, exist_ok=True)
    return RDBStorage(url)


def _journal(path: Path) -> BaseStorage:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = str(path.absolute())
    # Optuna's default lock is a link to the journal. If the link dangles, for example because of a
    # relative path, and its process was killed, the next process would wait forever.
    lock = JournalFileOpenLock(file)
    backend = JournalFileBackend(file, lock_obj=lock)
    lock.acquire()
    try:
        drop_partial_line(path)
    finally:
        lock.release()
    return JournalStorage(backend)

"""Paths as users give them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from distaff.errors import ConfigError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//?)(.*)", re.DOTALL)
# `Path("gs://bucket")` is "gs:/bucket", which may be a folder; these never are.
_SCHEMES = {
    *("abfs", "abfss", "az", "dbfs", "file", "ftp", "gcs", "gs", "hdfs", "hf", "http", "https"),
    *("memory", "s3", "s3a", "sftp"),
}


def as_path(given: str | os.PathLike[str], name: str) -> Path:
    """Returns an absolute local path; `~` is the home directory, and `file://` may stand before it.

    Args:
        given: what the user has passed.
        name: what errors call it, such as `"root"`.

    Raises:
        ConfigError: it is no path, or one of another file system, such as `gs://bucket/runs`.

    >>> as_path("file:///data/runs", "root").as_posix()
    '/data/runs'
    """
    text = given if isinstance(given, str) else _text_of(given, name)
    url = _URL.fullmatch(text)
    if url and (url[2] == "//" or url[1].lower() in _SCHEMES):
        text = _local(text, url, name)
    if "\0" in text:
        raise ConfigError(f"{name} is a path, which holds no null character; got {text!r}.")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(
            f"{name} begins with the home directory of a user, which cannot be found; got "
            f"{text!r}. Pass the whole path."
        ) from error


def _text_of(given: object, name: str) -> str:
    try:
        return os.fsdecode(given)  # ty: ignore[invalid-argument-type] the error is raised here
    except TypeError as error:
        raise ConfigError(f"{name} is a path; got {given!r}. Pass a string or a Path.") from error


def _local(text: str, url: re.Match[str], name: str) -> str:
    """Returns the path in a `file://` URL.

    Raises:
        ConfigError: it is another URL.
    """
    if url[1].lower() == "file":
        rest = f"/{url[3]}" if url[2] == "/" else url[3].removeprefix("localhost")
        if rest.startswith("/"):
            return rest
    raise ConfigError(
        f"{name} is a path of a local or mounted file system; got {text!r}. Mount that storage "
        "(gcsfuse, s3fs, NFS) and pass the path below the mount, or use a local directory and copy "
        "it afterwards."
    )


def shown(path: Path) -> str:
    """Returns a path as a display shows it: relative where it is below the current directory."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):  # elsewhere, or the current directory is gone
        return str(path)

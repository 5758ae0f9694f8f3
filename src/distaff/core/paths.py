"""Converts and shows the user's paths."""

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


def as_path(path: str | os.PathLike[str], name: str) -> Path:
    """Returns an absolute local path; expands `~` and accepts a `file://` URL.

    Raises:
        ConfigError: it is not a path, or is on remote storage, such as `gs://bucket/runs`; the
            message calls it `name`.

    >>> as_path("file:///data/runs", "root").as_posix()
    '/data/runs'
    """
    text = path if isinstance(path, str) else _text_of(path, name)
    url = _URL.fullmatch(text)
    if url and (url[2] == "//" or url[1].lower() in _SCHEMES):
        text = _local(text, url, name)
    if "\0" in text:
        raise ConfigError(f"{name} must be a path without null characters; got {text!r}.")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(
            f"{name} starts with a home directory that cannot be found; got {text!r}. Pass the "
            "whole path."
        ) from error


def _text_of(path: object, name: str) -> str:
    try:
        return os.fsdecode(path)  # ty: ignore[invalid-argument-type] the error is raised here
    except TypeError as error:
        message = f"{name} must be a path; got {path!r}. Pass a string or a Path."
        raise ConfigError(message) from error


def _local(text: str, url: re.Match[str], name: str) -> str:
    """Returns the path in a `file://` URL; raises ConfigError for any other URL."""
    if url[1].lower() == "file":
        rest = f"/{url[3]}" if url[2] == "/" else url[3].removeprefix("localhost")
        if rest.startswith("/"):
            return rest
    raise ConfigError(
        f"{name} must be on a local or mounted file system; got {text!r}. Mount that storage "
        "(gcsfuse, s3fs, NFS) and pass the path below the mount, or use a local directory and copy "
        "it afterwards."
    )


def shown(path: Path) -> str:
    """Returns a path for display, relative if it is in the current directory."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):  # outside it, or the current directory was deleted
        return str(path)

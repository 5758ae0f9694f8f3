"""The persistent compilation cache: what was compiled once on a machine stays compiled."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax


def enable() -> Path | None:
    """Keeps compiled programs on disk, for this process and those after it.

    They are kept in `$XDG_CACHE_HOME/distaff/jax`, by default `~/.cache/distaff/jax`, which only
    its owner can use: who can write there can run programs. It may be deleted at any time; nothing
    else keeps it small. A directory that was chosen before, by `JAX_COMPILATION_CACHE_DIR` or
    `jax.config`, stays as it is.

    Returns:
        The directory in use; None where none can be written.
    """
    config: Any = jax.config  # whose options are made at run time
    chosen = config.jax_compilation_cache_dir
    if chosen:
        return Path(chosen)
    directory = home("jax")
    if directory is not None:
        jax.config.update("jax_compilation_cache_dir", str(directory))
        # By default JAX keeps only what took a second: in a small model, nothing.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return directory


def home(folder: str = "") -> Path | None:
    """Returns `$XDG_CACHE_HOME/distaff`, or a folder of it, made for its owner alone.

    Returns:
        The directory; None where none can be written.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))  # a relative one does not count, by its rules
    with suppress(OSError, RuntimeError):  # no home, or one that cannot be written
        directory = (base if base.is_absolute() else Path.home() / ".cache") / "distaff" / folder
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)  # it may have been there before; an error if it is another's
        return directory
    return None

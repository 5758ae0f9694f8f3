"""Enables JAX's persistent compilation cache."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax


def enable() -> Path | None:
    """Stores compiled programs on disk, for this process and later ones.

    The directory is `$XDG_CACHE_HOME/distaff/jax`, by default `~/.cache/distaff/jax`. Only its
    owner has access, because whoever can write there can run code. It has no size limit, and can be
    deleted at any time. A directory already set by `JAX_COMPILATION_CACHE_DIR` or `jax.config` is
    left unchanged.

    Returns:
        The directory in use; None if none is writable.
    """
    config: Any = jax.config  # its options are defined at run time
    chosen = config.jax_compilation_cache_dir
    if chosen:
        return Path(chosen)
    directory = home("jax")
    if directory is not None:
        jax.config.update("jax_compilation_cache_dir", str(directory))
        # By default JAX stores only programs that took a second to compile.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return directory


def home(folder: str = "") -> Path | None:
    """Returns `$XDG_CACHE_HOME/distaff`, or a folder in it; creates it for its owner only.

    Returns:
        The directory; None if it is not writable.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))  # its specification ignores relative paths
    with suppress(OSError, RuntimeError):  # no home directory, or not writable
        directory = (base if base.is_absolute() else Path.home() / ".cache") / "distaff" / folder
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)  # for a directory that existed; raises if another user owns it
        return directory
    return None

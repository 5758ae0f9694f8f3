"""Compilers of accelerators that are installed on a machine without one, for `distaff plan`.

JAX starts every plugin that is installed, and looks for its devices. On a machine without them it
prints errors, and a program could not know early that it runs on the CPU.
"""

from __future__ import annotations

import contextlib
import glob
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import pkgutil
import re
import sys
from collections.abc import Generator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

_CUDA = re.compile(r"jax_plugins\.xla_cuda(\d+)")
_GOOGLE = "0x1ae0"
_VENDORS = "/sys/bus/pci/devices/*/vendor"


class _Idle(ModuleType):
    """Stands for a plugin that has no device here."""

    def initialize(self) -> None:
        """Registers nothing."""


def may_use_accelerator() -> bool:
    """Returns whether a plugin is installed that may have a device here; does not start JAX."""
    return bool(_plugins() - idle_plugins()) or (_is_installed("libtpu") and has_tpu())


def idle_plugins() -> set[str]:
    """Returns the modules of plugins that compile, but lack their part that runs programs.

    The package `jax-cuda12-pjrt` alone compiles for GPUs; to use one, it needs `jax-cuda12-plugin`.
    """
    found = {name: _CUDA.fullmatch(name) for name in _plugins()}
    versions = {name: match[1] for name, match in found.items() if match}
    return {name for name, n in versions.items() if not _is_installed(f"jax_cuda{n}_plugin")}


def has_tpu() -> bool:
    """Returns whether this machine has a TPU, by the same signs as JAX."""
    if "JAX_FORCE_TPU_INIT" in os.environ:
        return True
    for path in glob.glob(_VENDORS):
        with contextlib.suppress(OSError):
            if Path(path).read_text().strip() == _GOOGLE:
                return True
    return False


def ignore_idle() -> None:
    """Keeps JAX, which must not have started, from looking for devices that are not here."""
    config: Any = jax.config  # its options are defined at run time
    for name in idle_plugins():
        if name not in sys.modules:
            sys.modules[name] = _Idle(name)
            sys.modules[name].__spec__ = ModuleSpec(name, None)
    if not config.jax_platforms and _is_installed("libtpu") and not may_use_accelerator():
        jax.config.update("jax_platforms", "cpu")


def load_idle(name: str) -> None:
    """Starts a plugin that `ignore_idle` has kept from starting, to compile with it."""
    if isinstance(sys.modules.get(name), _Idle):
        del sys.modules[name]
        with _silent(name):
            os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
            importlib.import_module(name).initialize()


@contextlib.contextmanager
def _silent(name: str) -> Generator[None]:
    """Drops what a plugin logs and prints about the missing device."""
    logger = logging.getLogger(name)
    level, error = logger.level, os.dup(2)
    logger.setLevel(logging.CRITICAL)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(error, 2)
        os.close(error)
        logger.setLevel(level)


def _plugins() -> set[str]:
    found = {each.value for each in importlib.metadata.entry_points(group="jax_plugins")}
    spec = importlib.util.find_spec("jax_plugins")
    folders = spec.submodule_search_locations if spec is not None else None
    return found | {f"jax_plugins.{each.name}" for each in pkgutil.iter_modules(folders or [])}


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None

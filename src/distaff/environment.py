"""What a run runs on: the content of `env.json`."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

import jax

_PACKAGES = ("distaff", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def describe() -> dict[str, Any]:
    """Returns versions, platform, devices, processes, command line and commit, as strict JSON."""
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "devices": {"kind": devices[0].device_kind, "count": len(devices)},
        "processes": jax.process_count(),
        "argv": sys.argv,
        "git": _git(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Returns the commit of the working directory, and whether tracked files differ from it."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--exclude=*", "--abbrev=40"]
    try:
        described = subprocess.run(
            [*command, "--dirty"], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": described.removesuffix("-dirty"), "dirty": described.endswith("-dirty")}

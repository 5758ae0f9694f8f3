"""Describes the environment of a run, as recorded in `env.json`."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

_MOST_STARTS = 999
_PACKAGES = ("distaff", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def with_start(before: Any, time: str, now: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the content of `env.json` after one more start of a run.

    Args:
        before: the previous content; any value if it could not be read.
        time: time of the start.
        now: the present environment; None to find it out.

    Returns:
        The present environment, and in `starts` the environments of all starts, oldest first.
    """
    now = describe() if now is None else now
    return {**now, "starts": [*_starts(before)[-_MOST_STARTS:], {"time": time, **now}]}


def changes(before: Any, now: dict[str, Any]) -> list[str]:
    """Returns the differences to the environment of the previous start, by name."""
    old = (_starts(before) or [{}])[-1]
    was, are = ({**each.get("packages", {}), **each.get("devices", {})} for each in (old, now))
    pairs = {name: (was.get(name), value) for name, value in are.items() if name in was}
    pairs = {"python": (old.get("python", now["python"]), now["python"]), **pairs}
    return [f"{name}: {a} -> {b}" for name, (a, b) in pairs.items() if a != b]


def _starts(before: Any) -> list[dict[str, Any]]:
    if not isinstance(before, dict):
        return []
    starts = before.get("starts", [before])  # old files hold a single start
    starts = starts if isinstance(starts, list) else []
    return [each for each in starts if _is_description(each)]


def _is_description(value: Any) -> bool:
    parts = isinstance(value, dict) and [value.get("packages", {}), value.get("devices", {})]
    return bool(parts) and all(isinstance(each, dict) for each in parts)


def describe() -> dict[str, Any]:
    """Returns versions, platform, devices, processes, command line and commit, as strict JSON."""
    import jax  # here: reading the files of a run needs no JAX

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

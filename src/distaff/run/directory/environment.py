"""What a run runs on: the content of `env.json`."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

import jax

_MOST_STARTS = 999
_PACKAGES = ("distaff", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def with_start(before: Any, time: str) -> dict[str, Any]:
    """Returns what `env.json` holds after one more start of a run.

    Args:
        before: what it held; anything if it could not be read.
        time: of the start.

    Returns:
        What this start runs on, and in `starts` the same of every start, the oldest first.
    """
    now = describe()
    return {**now, "starts": [*_starts(before)[-_MOST_STARTS:], {"time": time, **now}]}


def changes(before: Any, now: dict[str, Any]) -> list[str]:
    """Returns what a start runs on that is other than at the start before, by name.

    Args:
        before: what `env.json` held; anything if it could not be read.
        now: what `describe` returns.
    """
    old = (_starts(before) or [{}])[-1]
    was, are = ({**each.get("packages", {}), **each.get("devices", {})} for each in (old, now))
    pairs = {name: (was.get(name), value) for name, value in are.items() if name in was}
    pairs = {"python": (old.get("python", now["python"]), now["python"]), **pairs}
    return [f"{name}: {a} -> {b}" for name, (a, b) in pairs.items() if a != b]


def _starts(before: Any) -> list[dict[str, Any]]:
    if not isinstance(before, dict):
        return []
    starts = before.get("starts", [before])  # the file had one start, before it had a list
    starts = starts if isinstance(starts, list) else []
    return [each for each in starts if _is_description(each)]


def _is_description(value: Any) -> bool:
    parts = isinstance(value, dict) and [value.get("packages", {}), value.get("devices", {})]
    return bool(parts) and all(isinstance(each, dict) for each in parts)


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

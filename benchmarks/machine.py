"""What the results were measured on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.rounds import ROOT, environment_of_a_user, python_of

_DEVICE = "import jax; print(jax.default_backend(), '/', jax.devices()[0].device_kind)"
_VERSIONS = """
import importlib.metadata as m, json, platform
found = {"python": platform.python_version()}
for name in %r:
    try:
        found[name] = m.version(name)
    except m.PackageNotFoundError:
        pass
print(json.dumps(found))
"""
_PACKAGES = (
    *("distaff", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scikit-learn"),
    *("keras", "torch", "lightning", "grain"),
)


def device() -> str:
    """Returns the platform of JAX and the kind of its first device, such as `cpu / cpu`."""
    python = python_of("core")
    assert python is not None
    return _printed([python, "-c", _DEVICE])


def versions() -> dict[str, dict[str, str]]:
    """Returns the versions of Python and of the packages, by environment."""
    found = {}
    for environment in ("core", "peers"):
        python = python_of(environment)
        if python is not None:
            found[environment] = json.loads(_printed([python, "-c", _VERSIONS % (_PACKAGES,)]))
    return found


def describe() -> dict[str, Any]:
    """Returns processor, cores, memory in GB, and what of the environment matters."""
    wanted = ("OMP_", "MKL_", "OPENBLAS_", "XLA_", "JAX_", "MALLOC_", "DISTAFF_")
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "system": platform.platform(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(wanted)},
    }


def commit() -> str:
    """Returns the commit of this checkout, with `+` if files differ from it; empty if unknown."""
    try:
        name = _printed(["git", "rev-parse", "--short", "HEAD"])
        return name + ("+" if _printed(["git", "status", "--porcelain"]) else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def load() -> float:
    """Returns how many processes have run or waited on average over the last minute."""
    return os.getloadavg()[0]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _printed(command: list[str]) -> str:
    env = environment_of_a_user()
    output = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return output.stdout.strip()

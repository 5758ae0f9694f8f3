"""Measures the peak FLOPs per second of a device, and caches the result on disk."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from distaff.core.files import write_whole
from distaff.execution import compile_cache

_log = logging.getLogger("distaff")

_SIZES = (1024, 2048, 4096)
_REPEATS = 3

_LONG_SECONDS = 0.01
"""A product that takes this long is large enough: its dispatch time is negligible."""


def peak_flops_of_all(num_devices: int, again: bool = False) -> float | None:
    """Returns the peak FLOPs per second of several equal devices; see `peak_flops`.

    Simulated devices of a CPU share its cores, so together they have the peak of one.
    """
    peak = peak_flops(again)
    return peak if peak is None or jax.default_backend() == "cpu" else num_devices * peak


def peak_flops(again: bool = False) -> float | None:
    """Returns the peak FLOPs per second of one device, measured with float32 matrix products.

    The products use JAX's default matmul precision (TF32 on a GPU unless configured otherwise).
    Measuring takes about 0.2 s on a CPU. The result is cached in `machine.json` next to the
    compiled programs, by device kind, number of cores, JAX version and precision; that file can be
    deleted at any time. A machine that is busy during the measurement yields too low a peak.

    Args:
        again: measure even if a peak is cached, and keep the higher one.

    Returns:
        The peak; None if it cannot be measured.
    """
    home, key = compile_cache.home(), _key()
    path = None if home is None else home / "machine.json"
    known = {} if path is None else _cached(path)
    if again or key not in known:
        try:
            measured = _measure()
        except Exception as error:  # such as out of memory: a report must not fail the run
            _log.debug("the peak of this machine cannot be measured: %s", error)
            return known.get(key)
        known = {**known, key: max(measured, known.get(key, 0.0))}
        if path is not None:
            with suppress(OSError):
                write_whole(path, json.dumps(known, indent=2) + "\n", mode=0o600)
    return known[key]


def _key() -> str:
    config: Any = jax.config  # its options are defined at run time
    device = jax.local_devices()[0]
    return (
        f"{device.platform} {device.device_kind}, {_num_cores()} cores, jax {jax.__version__}, "
        f"precision {config.jax_default_matmul_precision or 'default'}"
    )


def _num_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not available on every system
        return os.cpu_count() or 1


def _measure() -> float:
    product, best = jax.jit(jnp.matmul), 0.0
    for size in _SIZES:
        matrix = jnp.sin(jnp.arange(size * size, dtype=jnp.float32)).reshape(size, size)
        product(matrix, matrix).block_until_ready()
        seconds = min(_seconds(product, matrix) for _ in range(_REPEATS))
        best = max(best, 2 * size**3 / seconds)
        if seconds >= _LONG_SECONDS:
            break
    return best


def _seconds(product: Any, matrix: jax.Array) -> float:
    start = time.perf_counter()
    product(matrix, matrix).block_until_ready()
    return max(time.perf_counter() - start, 1e-9)


def _cached(path: Path) -> dict[str, float]:
    """Returns the peaks in a file by key; empty if it is absent or damaged."""
    with suppress(OSError, ValueError, AttributeError):
        peaks = json.loads(path.read_bytes())
        return {
            key: float(peak)
            for key, peak in peaks.items()
            if isinstance(peak, int | float) and math.isfinite(peak) and peak > 0
        }
    return {}

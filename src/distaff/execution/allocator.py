"""Tunes glibc's allocator so that XLA's CPU backend reuses the memory of a step.

At every call of a program XLA allocates temporary buffers from the C library, and frees them
afterwards. glibc returns large ones to the system, which must then zero new pages: 10,000 to 40,000
page faults per step of a medium-sized model, a fifth of its time. The measurements are in
`docs/decisions/0007-the-allocator.md`.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

from distaff.execution.compilers import ignore_idle, may_use_accelerator

_log = logging.getLogger("distaff")

# <malloc.h> of glibc.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_SETTINGS = {
    _M_ARENA_MAX: 1,
    _M_MMAP_MAX: 0,
    _M_TRIM_THRESHOLD: 2**31 - 1,
    _M_TOP_PAD: 256 * 2**20,
}

_MIN_BYTES = 5 * 10**7
"""Array bytes of a forward pass from which tuning pays; it slows smaller steps by up to 40 %."""


def tune(num_bytes: Callable[[], int] | None = None) -> str:
    """Tunes glibc's allocator for XLA on the CPU, once per process.

    Applies only to Linux with glibc if JAX runs on the CPU only, and before JAX's backend has
    started: from then on its threads have their own arenas. `DISTAFF_MALLOC=off` in the environment
    turns it off.

    Args:
        num_bytes: returns the bytes of all arrays of a forward pass, without starting JAX's backend
            (see `made_bytes`); small models are not tuned. Called only if needed; an error counts
            as large. None tunes at any size.

    Returns:
        `"tuned"`, or the reason the allocator was left unchanged.
    """
    reason = _reason_against()
    if num_bytes is not None and not reason:
        made = _call(num_bytes)
        if made is not None and made < _MIN_BYTES:
            reason = f"not tuned (a forward pass makes {made / 1e6:.3g} MB, which is little)"
    return _tune(reason)


@functools.cache
def _tune(reason: str) -> str:
    outcome = reason or (_TOO_LATE if has_started() else "") or _set()
    _log.info("memory allocator: %s", outcome)
    if outcome == _TOO_LATE:
        _late.add(outcome)
    return outcome


_late: set[str] = set()


def is_late() -> bool:
    """Whether `tune` was called too late in this process: JAX's backend had started."""
    return bool(_late)


def made_bytes(function: Callable[..., Any], *args: Any) -> int:
    """Returns the bytes of all arrays that a function creates, intermediate ones included.

    Args:
        function: traced, not run.
        *args: its arguments, or their shapes.
    """
    return _made_bytes(jax.make_jaxpr(function)(*args).jaxpr)


def _made_bytes(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        inner = [_made_bytes(each) for each in jaxprs_in_params(equation.params)]
        shaped = [each.aval for each in equation.outvars if hasattr(each.aval, "size")]
        total += sum(inner) if inner else sum(x.size * x.dtype.itemsize for x in shaped)
    return total


def _call(num_bytes: Callable[[], int]) -> int | None:
    try:
        return num_bytes()
    except Exception:  # the setup reports a model that cannot be traced
        return None


_TOO_LATE = (
    "not tuned, because JAX had started before the trainer was made. Steps of large models on "
    "the CPU may be slower; the first steps are measured. To tune it, call "
    "distaff.execution.allocator.tune() before any JAX array is made."
)


def _reason_against() -> str:
    if os.environ.get("DISTAFF_MALLOC", "").lower() in ("off", "0", "false", "no"):
        return "not tuned (DISTAFF_MALLOC)"
    if sys.platform != "linux" or "glibc" not in _libc():
        return "not tuned (not glibc)"
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return "not tuned (the environment configures it)"
    if os.environ.get("LD_PRELOAD"):
        return "not tuned (LD_PRELOAD may have replaced it)"
    if not on_cpu_alone():
        return "not tuned (JAX may run on an accelerator)"
    return ""


def _set() -> str:
    mallopt = ctypes.CDLL(None).mallopt
    refused = [name for name, value in _SETTINGS.items() if mallopt(name, value) != 1]
    return f"partly tuned (mallopt refused {refused})" if refused else "tuned"


def _libc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):
        return ""


def on_cpu_alone() -> bool:
    """Whether JAX will run on the CPU only; does not start its backend."""
    config: Any = jax.config  # its options are defined at run time
    platforms = config.jax_platforms
    if platforms:
        return platforms == "cpu"
    return not may_use_accelerator()


def ignore_compilers() -> None:
    """Keeps JAX from starting compilers of accelerators that this machine does not have.

    They are installed for `distaff plan`. Does nothing once JAX has started.
    """
    if not has_started():
        ignore_idle()


def has_started() -> bool:
    """Whether JAX's backend has started: from then on the number of CPU devices is fixed."""
    config: Any = jax.config  # its options are defined at run time
    number = config.jax_num_cpu_devices
    try:
        # JAX checks only a changed value.
        jax.config.update("jax_num_cpu_devices", 1 if number == -1 else number + 1)
        jax.config.update("jax_num_cpu_devices", number)
    except RuntimeError:
        return True
    return False

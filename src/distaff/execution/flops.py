"""Counts the FLOPs of a program with XLA, before it is compiled."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import jax
from jax.extend.core import jaxprs_in_params

_log = logging.getLogger("distaff")


class Flops(NamedTuple):
    """Floating point operations of one call of a program.

    Attributes:
        count: additions, multiplications and other floating point operations, one each.
        at_least: whether the program has loops. XLA counts the body of a loop once, so the true
            number may be higher.
    """

    count: float
    at_least: bool


def flops_of(program: Any, *args: Any) -> Flops | None:
    """Counts the FLOPs of a program. Traces and lowers it, and compiles nothing.

    XLA does not count custom calls (cuDNN's fused attention, Pallas kernels). Recomputation by
    `jax.checkpoint` counts twice.

    Args:
        program: a function returned by `jax.jit`.
        *args: its arguments, or their shapes.

    Returns:
        The FLOPs; None if they are unknown: `program` is plain Python, or the backend has no cost
        analysis. Never raises.
    """
    if not hasattr(program, "trace"):
        return None
    try:
        traced = program.trace(*jax.eval_shape(lambda *each: each, *args))
        # Backends of accelerators count only compiled programs; the CPU's needs no compile.
        with jax.default_device(jax.devices("cpu")[0]):
            count = (traced.lower().cost_analysis() or {}).get("flops", 0.0)
    except Exception as error:  # any error of a backend: a report must not fail the run
        _log.debug("the FLOPs of a step are unknown: %s", error)
        return None
    return Flops(float(count), _has_loop(traced.jaxpr.jaxpr)) if count > 0 else None


def _has_loop(jaxpr: Any) -> bool:
    return any(
        equation.primitive.name in ("scan", "while")
        or any(_has_loop(inner) for inner in jaxprs_in_params(equation.params))
        for equation in jaxpr.eqns
    )

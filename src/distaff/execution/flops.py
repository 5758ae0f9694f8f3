"""FLOPs of a program, as XLA counts them before it is compiled."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import jax
from jax.extend.core import jaxprs_in_params

_log = logging.getLogger("distaff")


class Flops(NamedTuple):
    """Floating point operations of one call of a program.

    Attributes:
        count: additions and multiplications, and whatever else computes with floats, one each.
        at_least: whether there are loops in it, whose body XLA counts once however often it runs.
    """

    count: float
    at_least: bool


def flops_of(program: Any, *args: Any) -> Flops | None:
    """Counts the FLOPs of a program; it is traced and lowered, not compiled.

    What a library computes is not seen by XLA (a fused attention of cuDNN, a Pallas kernel), and
    what is computed twice to save memory (`jax.checkpoint`) counts twice.

    Args:
        program: what `jax.jit` returned.
        *args: its arguments, or their shapes.

    Returns:
        The FLOPs; None where they are not known: for plain Python, and where the backend has no
        such analysis. It is never an error.
    """
    if not hasattr(program, "trace"):
        return None
    try:
        traced = program.trace(*jax.eval_shape(lambda *each: each, *args))
        # An accelerator's backend counts only what it has compiled; the CPU's counts at once.
        with jax.default_device(jax.devices("cpu")[0]):
            count = (traced.lower().cost_analysis() or {}).get("flops", 0.0)
    except Exception as error:  # whatever a backend raises: a run must not fail for its report
        _log.debug("the FLOPs of a step are not known: %s", error)
        return None
    return Flops(float(count), _has_loop(traced.jaxpr.jaxpr)) if count > 0 else None


def _has_loop(jaxpr: Any) -> bool:
    return any(
        equation.primitive.name in ("scan", "while")
        or any(_has_loop(inner) for inner in jaxprs_in_params(equation.params))
        for equation in jaxpr.eqns
    )

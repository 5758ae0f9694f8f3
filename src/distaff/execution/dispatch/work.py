"""Estimates the cost of a program from its jaxpr, before it is compiled."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from jax.extend.core import jaxprs_in_params


class Work(NamedTuple):
    """The work of one call of a program. Equal programs give equal numbers on every machine.

    Attributes:
        flops: FLOPs of matrix products and convolutions; a multiply-add counts as two.
        num_bytes: bytes of all intermediate arrays and outputs.
        operations: number of operations; each has a fixed cost.
        convolves: whether there is a convolution.
    """

    flops: float = 0.0
    num_bytes: float = 0.0
    operations: float = 0.0
    convolves: bool = False

    def times(self, number: float) -> Work:
        """Returns the work of this many calls."""
        counts = (number * count for count in (self.flops, self.num_bytes, self.operations))
        return Work(*counts, self.convolves)


def work_of(jaxpr: Any) -> Work:
    """Counts the work of a program.

    The body of a loop counts once per iteration, or once if their number is dynamic. Of several
    branches the most expensive one counts.

    Args:
        jaxpr: a `jax.core.Jaxpr`, such as `jax.make_jaxpr(function)(*args).jaxpr`.
    """
    return _sum(_of_equation(equation) for equation in jaxpr.eqns)


def _sum(works: Iterable[Work]) -> Work:
    flops = num_bytes = operations = 0.0
    convolves = False
    for work in works:
        flops += work.flops
        num_bytes += work.num_bytes
        operations += work.operations
        convolves |= work.convolves
    return Work(flops, num_bytes, operations, convolves)


def _of_equation(equation: Any) -> Work:
    name, params = equation.primitive.name, equation.params
    inner = [work_of(jaxpr) for jaxpr in jaxprs_in_params(params)]
    if name == "cond" and inner:
        most = max(inner, key=lambda work: (work.flops, work.num_bytes, work.operations))
        return most._replace(convolves=any(work.convolves for work in inner))
    if inner:
        return _sum(inner).times(params["length"] if name == "scan" else 1)
    arrays = [each.aval for each in equation.outvars if hasattr(each.aval, "dtype")]
    num_bytes = float(sum(x.size * x.dtype.itemsize for x in arrays))
    return Work(_flops(equation), num_bytes, 1.0, name == "conv_general_dilated")


def _flops(equation: Any) -> float:
    """Returns the FLOPs of a matrix product or a convolution; 0 for other operations."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2.0 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        # The kernel is [out, in / groups, ...] in the order of its specification.
        kernel, out_axis = equation.invars[1].aval, params["dimension_numbers"].rhs_spec[0]
        each = math.prod(size for axis, size in enumerate(kernel.shape) if axis != out_axis)
        return 2.0 * equation.outvars[0].aval.size * each
    return 0.0


class _Speed(NamedTuple):
    """Approximate throughput per second of a platform, and its least time per operation."""

    flops: float
    num_bytes: float
    operation_seconds: float


_SPEEDS = {
    "cpu": _Speed(flops=1e11, num_bytes=4e10, operation_seconds=1.5e-7),
    "gpu": _Speed(flops=2e13, num_bytes=1e12, operation_seconds=1e-6),
    "tpu": _Speed(flops=5e13, num_bytes=1e12, operation_seconds=5e-7),
}
"""Fixed for a typical machine on purpose: choices based on these are the same on all machines."""


def seconds_of(work: Work, platform: str) -> float:
    """Estimates the seconds of a program, to within a factor of about three, deterministically.

    Args:
        work: the work of the program.
        platform: as `jax.default_backend()` returns it; an unknown one counts as a GPU.
    """
    speed = _SPEEDS.get(platform, _SPEEDS["gpu"])
    computing = work.flops / speed.flops + work.num_bytes / speed.num_bytes
    return computing + work.operations * speed.operation_seconds

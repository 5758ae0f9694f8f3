"""Where a loss calls its model: right in the step, or inside a loop or another transformation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from flax.core import tracers

from distaff.core.typing import PyTree
from distaff.errors import LossError

_REPEATING = frozenset(("scan", "while_loop", "fori_loop", "map", "associative_scan", "vmap_f"))
"""Functions of JAX that trace a function once and run it several times."""


class CallSite(NamedTuple):
    """Where a function is called, as of the trace that it is part of.

    Attributes:
        trace: JAX's own name for the trace.
        loops: loops and `vmap`s around the call, from the outside in.
        is_inner: whether a transformation (`jax.checkpoint`, `vmap`, `scan`, `grad`, ...) stands
            between the step and the call: what is computed here cannot leave it by the side.
        is_repeated: whether the call is traced once and runs several times.
    """

    trace: Any
    loops: tuple[str, ...]
    is_inner: bool = False
    is_repeated: bool = False

    @classmethod
    def here(cls) -> CallSite:
        """Returns the place of the caller."""
        return cls(tracers.current_trace(), tuple(_loops()))

    def of_call(self) -> CallSite:
        """Returns the place of the caller as seen from here, where the step began."""
        trace = tracers.current_trace()
        if trace == self.trace:
            return self
        now = tuple(_loops())
        return CallSite(trace, now[len(self.loops) :], True, len(now) > len(self.loops))

    def loop_error(self, error: Exception) -> LossError:
        """Returns the error for a pass that would draw the same numbers each time.

        Args:
            error: says what it draws.
        """
        loop = "jax.vmap" if self.loops[-1] == "vmap_f" else f"jax.lax.{self.loops[-1]}"
        return LossError(
            "Each call of ctx.apply draws from a key of its own, and one inside a loop is a single "
            f"call: all of its passes would draw the same numbers. It is inside {loop}, and "
            f"{str(error).partition(', and this pass')[0]}. Split a key and hand one to each pass: "
            "keys = jax.random.split(ctx.rng, n), and ctx.apply(params, x, rngs=key)."
        )

    def change_error(self, changed: list[str]) -> LossError:
        """Returns the error for a change that cannot leave a transformation.

        Args:
            changed: names of the collections.
        """
        return LossError(
            "ctx keeps what changes in a pass, and nothing leaves a JAX transformation but by its "
            "return value. Inside jax.checkpoint, vmap, scan or grad, "
            f"this call changes {', '.join(changed)}. Call ctx outside of it: to save memory, use "
            "nn.remat (Flax Linen), nnx.remat or eqx.filter_checkpoint on layers inside the model; "
            "for several inputs, join them in one batch. Or leave the variables as they are: "
            "ctx.apply(params, x, train=False), under the model's own name for the mode."
        )


def same_leaves(before: PyTree, after: PyTree) -> bool:
    """Tells whether two trees hold the very same arrays."""
    first, second = jax.tree.leaves(before), jax.tree.leaves(after)
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))


def _loops() -> Iterator[str]:
    """Yields the loops of JAX that the caller is in, from the outside in."""
    found, frame = [], sys._getframe(1)
    while frame is not None:
        name, module = frame.f_code.co_name, frame.f_globals.get("__name__", "")
        if name in _REPEATING and module.startswith("jax."):
            found.append(name)
        frame = frame.f_back
    return reversed(found)

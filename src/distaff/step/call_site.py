"""Call sites of the model: directly in the step, or inside a loop or another transformation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from flax.core import tracers

from distaff.core.typing import PyTree
from distaff.errors import LossError

_REPEATING = frozenset(("scan", "while_loop", "fori_loop", "map", "associative_scan", "vmap_f"))
"""JAX functions that trace a function once and run it several times."""


class CallSite(NamedTuple):
    """The trace and the loops in which a function is called.

    Attributes:
        trace: JAX's current trace.
        loops: loops and `vmap`s around the call, from the outside in.
        is_inner: whether a transformation (`jax.checkpoint`, `vmap`, `scan`, `grad`, ...) lies
            between the step and the call, so that side effects cannot leave it.
        is_repeated: whether the call is traced once and runs several times.
    """

    trace: Any
    loops: tuple[str, ...]
    is_inner: bool = False
    is_repeated: bool = False

    @classmethod
    def here(cls) -> CallSite:
        """Returns the call site of the caller."""
        return cls(tracers.current_trace(), tuple(_loops()))

    def of_call(self) -> CallSite:
        """Returns the call site of the caller relative to this one, where the step began."""
        trace = tracers.current_trace()
        if trace == self.trace:
            return self
        now = tuple(_loops())
        return CallSite(trace, now[len(self.loops) :], True, len(now) > len(self.loops))

    def loop_error(self, error: Exception) -> LossError:
        """Returns the error for a pass that would draw the same numbers in every iteration."""
        loop = "jax.vmap" if self.loops[-1] == "vmap_f" else f"jax.lax.{self.loops[-1]}"
        return LossError(
            "Each call of ctx.apply draws from its own key, and a call inside a loop is traced "
            f"once: all of its passes would draw the same numbers. It is inside {loop}, and "
            f"{str(error).partition(', and this pass')[0]}. Split a key and pass one to each call: "
            "keys = jax.random.split(ctx.rng, n), and ctx.apply(params, x, rngs=key)."
        )

    def change_error(self, changed: list[str]) -> LossError:
        """Returns the error for collections whose change cannot leave a transformation."""
        return LossError(
            "ctx keeps the variables that a pass changes, but only return values leave a JAX "
            "transformation. Inside jax.checkpoint, vmap, scan or grad, "
            f"this call changes {', '.join(changed)}. Call ctx outside of it: to save memory, pass "
            "remat=... to the trainer, or use distaff.models.rematerialized in a loop of your own; "
            "for several inputs, join them in one batch. Or leave the variables unchanged: "
            "ctx.apply(params, x, train=False), under the model's own name for the mode."
        )


def same_leaves(before: PyTree, after: PyTree) -> bool:
    """Returns whether two trees hold identical array objects."""
    first, second = jax.tree.leaves(before), jax.tree.leaves(after)
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))


def _loops() -> Iterator[str]:
    """Yields the JAX loops around the caller, from the outside in."""
    found, frame = [], sys._getframe(1)
    while frame is not None:
        name, module = frame.f_code.co_name, frame.f_globals.get("__name__", "")
        if name in _REPEATING and module.startswith("jax."):
            found.append(name)
        frame = frame.f_back
    return reversed(found)

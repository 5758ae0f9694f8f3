"""How pure functions are made to run: compiled, or as plain Python for debugging."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import jax

from distaff.typing import PyTree


class Execution(Protocol):
    """Turns a pure function into a program."""

    def program(self, function: Callable[..., Any], *, donate: int | None = None) -> Any:
        """Returns the program; the argument at position `donate` gives its buffers away."""
        ...

    def part(self, function: Callable[..., Any]) -> Any:
        """Returns the function as a part of programs, traced once for all of them."""
        ...

    def guard(self) -> AbstractContextManager[None]:
        """Returns what the training loop runs its steps in."""
        ...

    def shapes(self, program: Callable[..., Any], *args: Any) -> PyTree:
        """Returns what the program would return, as `jax.ShapeDtypeStruct` or as arrays."""
        ...


class Compiled:
    """Each function becomes one XLA program per set of shapes."""

    def program(self, function: Callable[..., Any], *, donate: int | None = None) -> Any:
        """Returns `jax.jit(function)`."""
        return jax.jit(function, donate_argnums=() if donate is None else donate)

    def part(self, function: Callable[..., Any]) -> Any:
        """Returns the function with its trace remembered; it is inlined where it is called."""
        return jax.jit(function, inline=True)

    def guard(self) -> AbstractContextManager[None]:
        """Refuses to fetch from the device: a step that waits for the host is an error."""
        return jax.transfer_guard_device_to_host("disallow")

    def shapes(self, program: Callable[..., Any], *args: Any) -> PyTree:
        """Traces the program (the trace is reused when it runs); computes nothing."""
        return jax.eval_shape(program, *args)


class Eager:
    """Each function runs as plain Python: breakpoints, prints and concrete values work."""

    def program(self, function: Callable[..., Any], *, donate: int | None = None) -> Any:
        """Returns the function itself."""
        return function

    def part(self, function: Callable[..., Any]) -> Any:
        """Returns the function itself."""
        return function

    def guard(self) -> AbstractContextManager[None]:
        """Refuses nothing: a loss may print what it computes."""
        return nullcontext()

    def shapes(self, program: Callable[..., Any], *args: Any) -> PyTree:
        """Runs the program once: traced code could not read concrete values."""
        return program(*args)

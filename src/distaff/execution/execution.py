"""How pure functions are made to run: compiled, or as plain Python for debugging."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import jax
from jax.core import Tracer

from distaff.core.config.options import Options, one_of, option
from distaff.core.typing import PyTree
from distaff.execution.compile.recompiles import Recompile
from distaff.execution.placement import ONE_DEVICE, Placement

_LITTLE_EFFORT = {"xla_backend_optimization_level": 1}
"""Of XLA's CPU backend, from 0 to 3, its default. Level 0 changes the last bits of results."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionOptions(Options):
    """How functions are made to run."""

    debug: bool = option(
        False,
        "Run every step as plain Python, so that breakpoints and prints work.",
        resume="same run",
    )
    recompile: Recompile = option(
        "warn",
        """What to do when a training or evaluation program compiles again, after its first time:
        "warn" says which leaf has changed and what to do, "error" raises `RecompileError`,
        "ignore" says nothing.""",
        check=one_of(Recompile),
        resume="same run",
    )
    tune_process: bool = option(
        True,
        """Keep compiled programs on disk, and have the C library keep the memory that steps on the
        CPU need again.""",
        resume="same run",
    )


class Execution(Protocol):
    """Turns a pure function into a program."""

    @property
    def placement(self) -> Placement:
        """Where the arrays of its programs are."""
        ...

    def program(self, function: Callable[..., Any], *, donate: int | None = None) -> Any:
        """Returns the program; the argument at position `donate` gives its buffers away."""
        ...

    def once(self, function: Callable[..., Any]) -> Any:
        """Returns the function as a program that is called once, as an initialisation is.

        JAX keeps the program as long as the function lives, and an optimizer's functions outlive
        its trainer (JAX's caches hold them): pass one that is made for this call.
        """
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

    def jaxpr(self, program: Callable[..., Any], *args: Any) -> Any:
        """Returns what the program computes, as a jaxpr; None where it is not traced."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Compiled:
    """Each function becomes one XLA program per set of shapes."""

    placement: Placement = ONE_DEVICE

    def program(self, function: Callable[..., Any], *, donate: int | None = None) -> Any:
        """Returns `jax.jit(function)`."""
        return jax.jit(function, donate_argnums=() if donate is None else donate)

    def once(self, function: Callable[..., Any]) -> Any:
        """Returns `jax.jit(function)`, which on the CPU is compiled with less effort."""

        def run(*args: Any) -> Any:
            is_traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(args))
            # JAX takes options for whole programs only, and the effort is measured on the CPU only.
            is_plain = is_traced or jax.default_backend() != "cpu"
            return jax.jit(function, compiler_options=None if is_plain else _LITTLE_EFFORT)(*args)

        return run

    def part(self, function: Callable[..., Any]) -> Any:
        """Returns the function with its trace remembered; it is inlined where it is called."""
        return jax.jit(function, inline=True)

    guard = staticmethod(partial(jax.transfer_guard_device_to_host, "disallow"))
    """Makes a fetch from the device an error: no step waits for the host."""

    def shapes(self, program: Callable[..., Any], *args: Any) -> PyTree:
        """Traces the program (the trace is reused when it runs); computes nothing."""
        return jax.eval_shape(program, *args)

    def jaxpr(self, program: Callable[..., Any], *args: Any) -> Any:
        """Traces the program (the trace is reused when it runs); computes nothing."""
        return jax.make_jaxpr(program)(*args)


@dataclasses.dataclass(frozen=True, eq=False)
class Eager:
    """Each function runs as plain Python: breakpoints, prints and concrete values work."""

    placement: Placement = ONE_DEVICE

    def program(self, function: Callable[..., Any], *, donate: int | None = None) -> Any:
        """Returns the function itself."""
        return function

    def once(self, function: Callable[..., Any]) -> Any:
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

    def jaxpr(self, program: Callable[..., Any], *args: Any) -> Any:
        """Returns None: nothing is traced."""
        return None

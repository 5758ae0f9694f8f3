"""Executes pure functions: compiled by XLA, or as plain Python for debugging."""

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
from distaff.execution.determinism import Deterministic, check_deterministic
from distaff.execution.placement import ONE_DEVICE, Placement

_LITTLE_EFFORT = {"xla_backend_optimization_level": 1}
"""Optimization level of XLA's CPU backend: 0 to 3 (default). Level 0 changes results slightly."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionOptions(Options):
    """How functions are executed."""

    debug: bool = option(
        False,
        "Run every step as plain Python, so that breakpoints and prints work.",
        resume="same run",
    )
    deterministic: Deterministic = option(
        False,
        """Ask XLA for deterministic programs on a GPU, before JAX starts, so that equal runs have
        equal bits. Each start of a run repeats its first program of steps, and compares the bits;
        if they differ, True raises `ReproducibilityError`, which names the arrays, and "warn" logs
        a warning.""",
        check=check_deterministic,
        resume="same run",
    )
    recompile: Recompile = option(
        "warn",
        """What to do when a training or evaluation program compiles again: "warn" names the leaf
        that changed and the remedy, "error" raises `RecompileError`, "ignore" does nothing.""",
        check=one_of(Recompile),
        resume="same run",
    )
    tune_process: bool = option(
        True,
        """Cache compiled programs on disk, and tune the C library's allocator so that steps on the
        CPU reuse their memory.""",
        resume="same run",
    )


class Execution(Protocol):
    """Turns a pure function into a program."""

    @property
    def placement(self) -> Placement:
        """The placement of the arrays of its programs."""
        ...

    def program(self, function: Callable[..., Any], *, donate: int | None = None) -> Any:
        """Returns a program that donates the buffers of its argument at position `donate`."""
        ...

    def once(self, function: Callable[..., Any]) -> Any:
        """Returns a program to be called once, such as an initialisation.

        JAX keeps a program as long as its function lives, and its caches keep an optimizer's
        functions longer than the trainer: pass a function created for this call.
        """
        ...

    def part(self, function: Callable[..., Any]) -> Any:
        """Returns the function for use inside programs, traced once for all of them."""
        ...

    def guard(self) -> AbstractContextManager[None]:
        """Returns the context in which the training loop runs its steps."""
        ...

    def shapes(self, program: Callable[..., Any], *args: Any) -> PyTree:
        """Returns the outputs of the program, as `jax.ShapeDtypeStruct` or as arrays."""
        ...

    def jaxpr(self, program: Callable[..., Any], *args: Any) -> Any:
        """Returns the jaxpr of the program; None if it is not traced."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Compiled:
    """Compiles each function to one XLA program per set of shapes."""

    placement: Placement = ONE_DEVICE

    def program(self, function: Callable[..., Any], *, donate: int | None = None) -> Any:
        """Returns `jax.jit(function)`."""
        return jax.jit(function, donate_argnums=() if donate is None else donate)

    def once(self, function: Callable[..., Any]) -> Any:
        """Returns `jax.jit(function)`, compiled on the CPU with a lower optimization level."""

        def run(*args: Any) -> Any:
            is_traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(args))
            # JAX accepts compiler options for whole programs only; the gain is measured on CPUs.
            is_plain = is_traced or jax.default_backend() != "cpu"
            options: Any = None if is_plain else _LITTLE_EFFORT
            places = None if is_traced else self.placement.out_shardings(function, *args)
            placed = {} if places is None else {"out_shardings": places}
            return jax.jit(function, compiler_options=options, **placed)(*args)

        return run

    def part(self, function: Callable[..., Any]) -> Any:
        """Returns the function with its trace cached; it is inlined at each call."""
        return jax.jit(function, inline=True)

    guard = staticmethod(partial(jax.transfer_guard_device_to_host, "disallow"))
    """Raises on a transfer from the device, so that no step waits for one."""

    def shapes(self, program: Callable[..., Any], *args: Any) -> PyTree:
        """Traces the program (the trace is reused when it runs); computes nothing."""
        return jax.eval_shape(program, *args)

    def jaxpr(self, program: Callable[..., Any], *args: Any) -> Any:
        """Traces the program (the trace is reused when it runs); computes nothing."""
        return jax.make_jaxpr(program)(*args)


@dataclasses.dataclass(frozen=True, eq=False)
class KeepsPrograms(Compiled):
    """Keeps the programs of `once`, for several models that are initialized one after the other.

    Functions with the same code and the same closure share a program, and so have the same bits.
    """

    programs: dict[Any, tuple[Callable[..., Any], Any]] = dataclasses.field(default_factory=dict)

    def once(self, function: Callable[..., Any]) -> Any:
        """Returns the program of an earlier function of the same code, or a new one."""
        cells = getattr(function, "__closure__", None) or ()
        key = getattr(function, "__code__", function), *(id(cell.cell_contents) for cell in cells)
        if key not in self.programs:
            is_cpu = jax.default_backend() == "cpu"
            program = jax.jit(function, compiler_options=_LITTLE_EFFORT if is_cpu else None)
            self.programs[key] = function, program  # the function keeps the ids alive
        plain, program = self.programs[key]

        def run(*args: Any) -> Any:
            is_traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(args))
            return jax.jit(plain)(*args) if is_traced else program(*args)

        return run


@dataclasses.dataclass(frozen=True, eq=False)
class Eager:
    """Runs each function as plain Python: breakpoints, prints and concrete values work."""

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
        """Allows transfers: a loss may print its values."""
        return nullcontext()

    def shapes(self, program: Callable[..., Any], *args: Any) -> PyTree:
        """Runs the program once, because traced code cannot read concrete values."""
        return program(*args)

    def jaxpr(self, program: Callable[..., Any], *args: Any) -> Any:
        """Returns None: nothing is traced."""
        return None

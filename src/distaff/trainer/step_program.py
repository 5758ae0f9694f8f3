"""Compiled steps that keep the function they were compiled from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """A pure function and its compiled program. Calling it runs the program.

    Attributes:
        function: the function, which a run may fuse into programs of several steps.
        program: the result of `jax.jit`, whose methods, such as `lower`, are available here.
    """

    function: Callable[..., Any]
    program: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        """Runs the program."""
        return self.program(*arguments)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # requested by `copy` before `program` exists
            raise AttributeError(name)
        return getattr(self.program, name)


def function_of(program: Any) -> Any:
    """Returns the pure function of a `StepProgram`; other programs unchanged."""
    return program.function if isinstance(program, StepProgram) else program

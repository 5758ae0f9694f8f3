"""Step programs: the programs that Distaff makes of a step, known again by their function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """A pure function, and the program that was made of it; a call runs the program.

    Attributes:
        function: what a run may put into programs of several steps.
        program: as `jax.jit` returns it; its methods, such as `lower`, are methods of this one.
    """

    function: Callable[..., Any]
    program: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        """Runs the program."""
        return self.program(*arguments)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copies ask for before there is a program
            raise AttributeError(name)
        return getattr(self.program, name)


def function_of(program: Any) -> Any:
    """Returns the pure function of a program of Distaff's; one of the user's own as it is."""
    return program.function if isinstance(program, StepProgram) else program

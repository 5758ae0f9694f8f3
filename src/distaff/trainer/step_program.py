"""Step programs: the programs that Distaff makes of a step, known again by their function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class StepProgram(NamedTuple):
    """A pure function, and the program that was made of it.

    Attributes:
        function: what a run may put into programs of several steps.
        program: what a call runs.
    """

    function: Callable[..., Any]
    program: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        """Runs the program."""
        return self.program(*arguments)

    @staticmethod
    def function_of(*programs: Any) -> list[Any]:
        """Returns the pure functions of programs; one of the user's own as it is."""
        return [each.function if isinstance(each, StepProgram) else each for each in programs]

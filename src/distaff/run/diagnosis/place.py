"""Place: where in a model, and in whose code, an operation of a traced program comes from."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any

import flax
import jax
import optax

from distaff.core.equations import is_scope

_DISTAFF = Path(__file__).parents[2]
_LIBRARIES = tuple(str(Path(each.__file__).parent) + os.sep for each in (jax, flax, optax))
_STANDARD_LIBRARY = str(Path(os.__file__).parent) + os.sep


def scope(path: tuple[Any, ...]) -> str:
    """Returns the names that the model gives to where an operation is: those of its modules.

    Args:
        path: the equation of the operation, after those of the calls that lead to it.

    Returns:
        Such as `"MLP/Dense_0"`; empty outside of any.
    """
    stacks = "/".join(str(equation.source_info.name_stack) for equation in path)
    names: list[str] = []
    for piece in stacks.split("/"):
        name = re.sub(r"\w+\(|\)", "", piece)  # of transpose(jvp(MLP)), MLP
        if name != piece and (is_scope(name) or name in names[:1]):
            names = []  # What a gradient computes anew is named from the start again.
        if name and not is_scope(name) and name not in ("checkpoint", "rematted_computation"):
            names.append(name)
    return "/".join(names)


def line(path: tuple[Any, ...]) -> str:
    """Returns the innermost line of the user's code that an operation comes from.

    Args:
        path: the equation of the operation, after those of the calls that lead to it. JAX keeps
            of each the frames inside of its call: a function that is called from several places
            is traced once.

    Returns:
        Such as `"model.py:31"`, the path being relative to the working directory if it is inside;
        empty where there are only libraries: JAX, Flax, Optax, and the parts of Distaff that are no
        models or tasks.
    """
    for equation in reversed(path):
        traceback = equation.source_info.traceback
        for frame in () if traceback is None else traceback.frames:
            if not _is_library(frame.file_name):
                return f"{frame.file_name.removeprefix(os.getcwd() + os.sep)}:{frame.line_num}"
    return ""


@functools.cache
def _is_library(file: str) -> bool:
    if _DISTAFF in Path(file).parents:
        return Path(file).relative_to(_DISTAFF).parts[0] not in ("zoo", "tasks")
    # What is installed may be inside of the standard library's directory.
    is_standard = file.startswith(_STANDARD_LIBRARY) and "-packages" not in file
    return is_standard or file.startswith(_LIBRARIES)

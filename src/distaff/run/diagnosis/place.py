"""Locates an operation of a traced program in the model and in the user's code."""

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
    """Returns the module scope of an operation.

    Args:
        path: the equations of the enclosing calls, followed by that of the operation.

    Returns:
        The scope, such as `"MLP/Dense_0"`; empty outside of modules.
    """
    stacks = "/".join(str(equation.source_info.name_stack) for equation in path)
    names: list[str] = []
    for piece in stacks.split("/"):
        name = re.sub(r"\w+\(|\)", "", piece)  # MLP in transpose(jvp(MLP))
        if name != piece and (is_scope(name) or name in names[:1]):
            names = []  # Recomputed operations of a gradient repeat the names from the start.
        if name and not is_scope(name) and name not in ("checkpoint", "rematted_computation"):
            names.append(name)
    return "/".join(names)


def line(path: tuple[Any, ...]) -> str:
    """Returns the innermost line of the user's code that produced an operation.

    Args:
        path: the equations of the enclosing calls, followed by that of the operation. Each has only
            the frames inside its call, because a function called repeatedly is traced once.

    Returns:
        The line, such as `"model.py:31"`, relative to the working directory if possible; empty if
        there is only library code: JAX, Flax, Optax, and Distaff except for its models and tasks.
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
    # Installed packages may be inside the standard library's directory.
    is_standard = file.startswith(_STANDARD_LIBRARY) and "-packages" not in file
    return is_standard or file.startswith(_LIBRARIES)

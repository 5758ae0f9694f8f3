"""The command `distaff fit`: trains a recipe."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

import distaff
from distaff.cli.recipes import RECIPES, find
from distaff.errors import ConfigError, RunDirectoryError
from distaff.run.directory.run_directory import RunDirectory

_USAGE = """usage: distaff fit RECIPE [OPTIONS]
       distaff fit --config RUN [OPTIONS]

Trains a recipe from start to finish, and writes the run below runs/. Start the same command again
to resume it. RECIPE is a name, or a function of your own, whose parameters become options:
`file.py:function` or `package.module:function`. --config repeats the command of a run, such as
runs/digits/0001; further options replace the same options of the run.

recipes:
{recipes}

distaff fit RECIPE --help lists a recipe's options.
"""


def main(words: Sequence[str]) -> int:
    """Runs `distaff fit` with these arguments; returns the exit status.

    Raises:
        DistaffError: the recipe is unknown, an option is wrong, or the training failed.
    """
    if not words or words[0] in ("-h", "--help"):
        listed = (f"  {name:<10} {recipe.summary}" for name, recipe in RECIPES.items())
        print(_USAGE.format(recipes="\n".join(listed)), end="")
        return 0
    if words[0] == "--config" or words[0].startswith("--config="):
        words = _repeated(words)
    _ = distaff.TrainerModule  # loads the library before the recipe imports JAX, which is faster
    done = run_recipe(words, prog=f"distaff fit {words[0]}")
    from distaff.run.result import TrainResult  # needs JAX, which the help does not load

    was_stopped = isinstance(done, TrainResult) and done.status == "interrupted"
    return 130 if was_stopped and done.reason == "Ctrl-C" else 0


def run_recipe(words: Sequence[str], *, prog: str) -> Any:
    """Runs a recipe, and returns its result.

    Args:
        words: the recipe, then its options.
        prog: the name of the command, for the help and errors of options.

    Raises:
        ConfigError: there is no such recipe.
    """
    recipe, options = find(words[0]), list(words[1:])
    if inspect.isclass(recipe):
        made: Any = tyro.cli(recipe, prog=prog, args=options)
        return made.run()
    if (kind := _only_options(recipe)) is not None:
        return recipe(tyro.cli(kind, prog=prog, args=options))
    return tyro.cli(recipe, prog=prog, args=options)


def _only_options(recipe: Callable[..., Any]) -> type | None:
    """Returns the dataclass that is a function's only parameter, or None."""
    parameters = list(inspect.signature(recipe).parameters)
    if len(parameters) != 1:
        return None
    kind = typing.get_type_hints(recipe).get(parameters[0])
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


def _repeated(words: Sequence[str]) -> list[str]:
    """Returns the arguments of the command that made a run, then those that follow its path."""
    _, equals, path = words[0].partition("=")
    rest = list(words[1:]) if equals else list(words[2:])
    if not equals:
        path = words[1] if len(words) > 1 else ""
    if not path:
        raise ConfigError("--config needs the path of a run, such as runs/digits/0001.")
    command = _command(Path(path))
    if command[:1] != ["fit"]:
        raise ConfigError(
            f"--config repeats runs of `distaff fit`; {path} was made by "
            f"{json.dumps(command)}. Run that program again."
        )
    return command[1:] + rest


def _command(path: Path) -> list[str]:
    """Returns the command line that first started a run, without the program if that is Distaff."""
    facts = RunDirectory.open(path).read_json("env.json")
    try:
        starts = facts.get("starts") or [facts]
        program, *arguments = map(str, starts[0]["argv"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunDirectoryError(
            f"The file env.json of {str(path)!r} names no command. Run the recipe by its name."
        ) from error
    return arguments if Path(program).name in ("distaff", "distaff.exe") else [program, *arguments]

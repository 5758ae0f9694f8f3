"""The command `distaff fit`: trains a recipe."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import typing
from collections.abc import Callable, Sequence
from typing import Any

import tyro

import distaff
from distaff.cli import earlier
from distaff.cli.recipes import RECIPES, find
from distaff.core.paths import shown

_USAGE = """usage: distaff fit RECIPE [OPTIONS]
       distaff fit RECIPE --resume [RUN] [OPTIONS]
       distaff fit --resume [RUN] [OPTIONS]
       distaff fit --config RUN [OPTIONS]

Trains a recipe from start to finish, and writes the run below runs/. Start the same command again
to resume it. RECIPE is a name, or a function of your own, whose parameters become options:
`file.py:function` or `package.module:function`.

--resume resumes a run such as runs/digits/0001, with the options that it was started with; without
RUN, the newest unfinished run of RECIPE. It never starts a new run in its place. --config starts
the command of a run again. Further options replace the same options of the run.

recipes:
{recipes}

distaff fit --list prints what each recipe needs; distaff fit RECIPE --help lists its options.
"""


def main(words: Sequence[str]) -> int:
    """Runs `distaff fit` with these arguments; returns the exit status.

    Raises:
        DistaffError: the recipe is unknown, an option is wrong, there is no run to resume, or the
            training failed.
    """
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE.format(recipes=_listed()), end="")
        return 0
    if words[0] == "--list":
        print(_listed(needs=True))
        return 0
    if earlier.wanted("--config", words) == 0:
        words = earlier.repeated(words)
    place = earlier.wanted("--resume", words)
    if place == 0:
        run, words = earlier.resumption(words)
    _ = distaff.TrainerModule  # loads the library before the recipe imports JAX, which is faster
    recipe = find(words[0])
    if place is None or {"-h", "--help"} & {*words} or (place > 0 and _has_resume(recipe)):
        return _train(recipe, words)
    if place > 0:
        run, words = earlier.resumption(words)
    from distaff.run.identity.request import resuming  # needs JAX, which the help does not load

    print(f"resuming {shown(run)}: distaff fit {shlex.join(words)}")
    with resuming(run):
        return _train(recipe, words)


def _listed(*, needs: bool = False) -> str:
    """Returns the built-in recipes, with their summaries or with what to install for each."""
    lines = []
    for name, recipe in RECIPES.items():
        text = f'pip install "{recipe.install}"' if needs else recipe.summary
        lines.append(f"  {name:<20} {text}")
    return "\n".join(lines)


def _train(recipe: Callable[..., Any], words: Sequence[str]) -> int:
    """Runs a recipe with the options after its name; returns the exit status."""
    done = run_recipe(recipe, words[1:], prog=f"distaff fit {words[0]}")
    from distaff.run.result import TrainResult  # needs JAX, which the help does not load

    was_stopped = isinstance(done, TrainResult) and done.status == "interrupted"
    return 130 if was_stopped and done.reason == "Ctrl-C" else 0


def run_recipe(recipe: Callable[..., Any], words: Sequence[str], *, prog: str) -> Any:
    """Runs a recipe, and returns its result.

    Args:
        recipe: the recipe.
        words: its options.
        prog: the name of the command, for the help and errors of options.
    """
    options = list(words)
    if inspect.isclass(recipe):
        made: Any = tyro.cli(recipe, prog=prog, args=options)
        return made.run()
    if (kind := only_options(recipe)) is not None:
        return recipe(tyro.cli(kind, prog=prog, args=options))
    return tyro.cli(recipe, prog=prog, args=options)


def _has_resume(recipe: Callable[..., Any]) -> bool:
    """Whether a recipe has an option `resume` of its own."""
    kind = recipe if inspect.isclass(recipe) else only_options(recipe)
    if dataclasses.is_dataclass(kind):
        return "resume" in (field.name for field in dataclasses.fields(kind))
    return "resume" in inspect.signature(recipe).parameters


def only_options(recipe: Callable[..., Any]) -> type | None:
    """Returns the dataclass that is a function's only parameter, or None."""
    parameters = list(inspect.signature(recipe).parameters)
    if len(parameters) != 1:
        return None
    kind = typing.get_type_hints(recipe).get(parameters[0])
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None

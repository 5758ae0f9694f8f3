"""The command line: `distaff fit <recipe> [options]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from distaff.cli.digits import Digits
from distaff.errors import DistaffError, nearest

RECIPES = {"digits": Digits}
"""Recipes by name: dataclasses of options with a `run` method."""

_USAGE = """usage: distaff fit RECIPE [OPTIONS]

Trains a recipe from start to finish, and writes the run below runs/.

recipes:
{recipes}

distaff fit RECIPE --help lists a recipe's options.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: the arguments after `distaff`; defaults to `sys.argv[1:]`.

    Returns:
        The exit status: 0, or 2 for an unknown command or an invalid option.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help") or words == ["fit", "--help"]:
        print(_usage())
        return 0
    if words[0] != "fit":
        return _failed(f"There is no command {words[0]!r}. {nearest(words[0], ['fit'])}")
    if len(words) < 2 or words[1] not in RECIPES:
        given = words[1] if len(words) > 1 else ""
        return _failed(f"There is no recipe {given!r}. {nearest(given, RECIPES)}")
    try:
        recipe = tyro.cli(RECIPES[words[1]], prog=f"distaff fit {words[1]}", args=words[2:])
        recipe.run()
    except DistaffError as error:
        return _failed(str(error))
    return 0


def _usage() -> str:
    lines = [f"  {name:<10} {str(cls.__doc__).splitlines()[0]}" for name, cls in RECIPES.items()]
    return _USAGE.format(recipes="\n".join(lines))


def _failed(message: str) -> int:
    print(f"distaff: {message}", file=sys.stderr)
    return 2

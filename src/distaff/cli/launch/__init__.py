"""The command `distaff launch`: starts the processes of one training on this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from distaff.cli.recipes import RECIPES, find
from distaff.errors import ConfigError

_USAGE = "usage: distaff launch --processes N [OPTIONS] TARGET [ARGUMENTS]"


def main(words: Sequence[str]) -> int:
    """Runs `distaff launch` with these arguments; returns the exit status.

    Raises:
        DistaffError: an option is wrong, or there is no such file.
    """
    import tyro  # here: the processes import this package, too

    from distaff.cli.launch.launcher import Launcher
    from distaff.cli.launch.options import LaunchOptions

    number = _number_of_options(words)
    about, _, _ = (LaunchOptions.__doc__ or "").partition("Args:")
    options = tyro.cli(
        LaunchOptions,
        prog="distaff launch",
        args=list(words[:number]),
        description=f"{_USAGE}\n\n{about.strip()}",
    )
    if number == len(words):
        raise ConfigError(
            "`distaff launch` needs what to start after its options: a recipe such as "
            "`train.py:main`, or a script such as `train.py`."
        )
    if sys.platform == "win32":
        raise ConfigError("`distaff launch` needs POSIX signals, which Windows does not have.")
    _check(words[number])
    return Launcher(options, words[number:]).run()


def _number_of_options(words: Sequence[str]) -> int:
    """Returns how many words precede the target: options, each with one value."""
    number = 0
    while number < len(words) and words[number].startswith("-"):
        is_whole = "=" in words[number] or words[number] in ("-h", "--help")
        number += 1 if is_whole else 2
    return min(number, len(words))


def _check(target: str) -> None:
    """Checks that a target can be started, as far as that needs no import."""
    place, colon, _ = target.rpartition(":")
    path = Path(place if colon else target)
    if path.suffix == ".py" and not path.is_file():
        raise ConfigError(f"There is no file {str(path)!r}. Check the path.")
    if path.suffix != ".py" and not colon and target not in RECIPES:
        find(target)  # raises

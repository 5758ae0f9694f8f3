"""Finds the earlier run whose command `--config` repeats, or which `--resume` resumes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from distaff.core.paths import as_path, shown
from distaff.errors import ConfigError, RunDirectoryError
from distaff.report.summary import find_runs, read_mapping
from distaff.run.directory.run_directory import RunDirectory
from distaff.run.directory.run_lock import is_running

_MOST_REPEATS = 100
_ENDED = {"finished": "has finished", "stopped": "was stopped by a callback"}


class Resumption(NamedTuple):
    """What `--resume` asks for.

    Attributes:
        run: the run to resume.
        words: its recipe and options.
    """

    run: Path
    words: list[str]


def wanted(option: str, words: Sequence[str]) -> int | None:
    """Returns the place of an option such as `--resume` or `--resume=RUN` among words, or None."""
    for place, word in enumerate(words):
        if word == option or word.startswith(f"{option}="):
            return place
    return None


def repeated(words: Sequence[str]) -> list[str]:
    """Returns the arguments of the command that made a run, then those that follow its path.

    Args:
        words: `--config RUN` or `--config=RUN`, and further options.

    Raises:
        DistaffError: there is no such run, or another program made it.
    """
    path, rest = _value(words, 0)
    if path is None:
        raise ConfigError("--config needs the path of a run, such as runs/digits/0001.")
    return _command(Path(path), "--config repeats") + rest


def resumption(words: Sequence[str]) -> Resumption:
    """Returns the run that `--resume` names, or the newest one of the recipe that can be resumed.

    Args:
        words: `--resume`, by itself or with a run, and before or after it a recipe and options.

    Raises:
        DistaffError: there is no such run, it has ended, or another program made it.
    """
    place = wanted("--resume", words)
    assert place is not None
    path, rest = _value(words, place)
    recipe = rest.pop(0) if rest and place > 0 else None
    root = Path(_option("--root", rest) or "runs")
    run = _newest(root, recipe) if path is None else _checked(as_path(path, "--resume"))
    own, *options = _command(run, "--resume resumes")
    _check_root(run, _option("--root", rest))
    return Resumption(run, [recipe or own, *options, *rest])


def _value(words: Sequence[str], place: int) -> tuple[str | None, list[str]]:
    """Returns the value of the option at a place, and the other words."""
    _, equals, value = words[place].partition("=")
    before, after = list(words[:place]), list(words[place + 1 :])
    if not equals and after and not after[0].startswith("-"):
        value = after.pop(0)
    return value or None, before + after


def _option(name: str, words: Sequence[str]) -> str | None:
    place = wanted(name, words)
    return None if place is None else _value(words, place)[0]


def _checked(run: Path) -> Path:
    """Returns the path of a run that can be resumed.

    Raises:
        RunDirectoryError: there is no such run.
        ConfigError: it has ended.
    """
    facts = read_mapping(RunDirectory.open(run), "status.json")
    status = str(facts.get("status"))
    if status in _ENDED:
        raise ConfigError(
            f"{shown(run)} {_ENDED[status]}, so there is nothing to resume. To run its command "
            f"again, use: distaff fit --config {shlex.quote(shown(run))}"
        )
    return run


def _newest(root: Path, recipe: str | None) -> Path:
    """Returns the newest run of a recipe that was cut off, and is not running.

    Raises:
        ConfigError: no run qualifies.
        RunDirectoryError: there is no such folder.
    """
    for run in reversed(list(find_runs(root))):
        was_cut = run.status in ("running", "interrupted", "failed") and not run.archived
        if was_cut and not is_running(run.path) and _is_of(run.path, recipe):
            return run.path
    of = f" of {recipe!r}" if recipe else ""
    raise ConfigError(
        f"There is no unfinished run{of} in {str(root)!r}, so there is nothing to resume. Name the "
        "run, such as --resume runs/digits/0001, pass the --root of the runs, or leave out "
        "--resume to start a new run."
    )


def _is_of(run: Path, recipe: str | None) -> bool:
    try:
        return recipe in (None, _command(run, "")[0])
    except (ConfigError, RunDirectoryError):
        return False


def _check_root(run: Path, root: str | None) -> None:
    """Checks that the recipe will look for its runs where this run is.

    Raises:
        ConfigError: its root is relative to another folder.
    """
    options = read_mapping(RunDirectory.open(run), "config.json").get("options")
    recorded = options.get("root") if isinstance(options, dict) else None
    used = as_path(root or str(recorded or "runs"), "root").resolve()
    if not run.resolve().is_relative_to(used):
        raise ConfigError(
            f"--resume must run where the run was started: {str(run)!r} is not in {str(used)!r}, "
            "the root of the recipe. Change to that folder, or pass the --root of the run."
        )


def _command(path: Path, purpose: str) -> list[str]:
    """Returns the recipe and the options of the command that first started a run.

    Raises:
        ConfigError: another program started it.
        RunDirectoryError: there is no such run, or its command is not recorded.
    """
    rest: list[str] = []
    for _ in range(_MOST_REPEATS):
        command = _recorded(path)
        if command[:1] != ["fit"] or len(command) < 2:
            raise ConfigError(
                f"{purpose} runs of `distaff fit`; {path} was made by {json.dumps(command)}. Run "
                "that program again."
            )
        place = wanted("--config", command)
        if place != 1:
            return command[1:] + rest
        value, options = _value(command[1:], 0)  # that command repeated another run's
        path, rest = Path(str(value)), options + rest
    raise ConfigError(f"The commands of {path} repeat each other. Run the recipe by its name.")


def _recorded(path: Path) -> list[str]:
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

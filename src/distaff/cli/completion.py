"""Completes the words of a command line in bash, zsh and fish.

The script of a shell asks `distaff --complete LINE` at each Tab, so it never goes out of date.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from distaff.errors import ConfigError, nearest

SCRIPTS = {
    "bash": """_distaff() {
  local IFS=$'\\n' line="${COMP_LINE:0:COMP_POINT}" word place
  COMPREPLY=($("$1" --complete "$line" 2>/dev/null))
  word="${line##*[[:space:]]}"
  if [[ "$word" == *:* && "$COMP_WORDBREAKS" == *:* ]]; then
    for place in "${!COMPREPLY[@]}"; do
      COMPREPLY[place]="${COMPREPLY[place]#"${word%:*}:"}"
    done
  fi
}
complete -o default -F _distaff distaff
""",
    "zsh": """#compdef distaff
_distaff() {
  local -a found
  found=(${(f)"$("$words[1]" --complete "${(j: :)words[1,CURRENT]}" 2>/dev/null)"})
  if (( $#found )); then
    compadd -a found
  else
    _files
  fi
}
compdef _distaff distaff
""",
    "fish": """function __distaff
  distaff --complete (commandline -cp | string collect) 2>/dev/null
end
complete -c distaff -a '(__distaff)'
""",
}
"""Scripts by shell."""

_OPTIONS = re.compile(r"^\W*(?:-h, )?(--[a-z][\w.-]*(?:, --[\w.-]+)*)", re.MULTILINE)
_COMMANDS = re.compile(r"^  (\w+)  ", re.MULTILINE)


def script(shell: str) -> str:
    """Returns the script of a shell.

    Raises:
        ConfigError: there is no script for this shell.
    """
    if shell not in SCRIPTS:
        raise ConfigError(f"There is no completion for {shell!r}. {nearest(shell, SCRIPTS)}")
    return SCRIPTS[shell]


def candidates(
    line: str, commands: Collection[str], run: Callable[[Sequence[str]], int]
) -> list[str]:
    """Returns what the last word of a line can become; nothing for file names.

    Args:
        line: the command line up to the cursor.
        commands: the names of all commands.
        run: runs a command line, for its help.
    """
    try:
        words = shlex.split(line)[1:]
    except ValueError:  # an open quote
        return []
    last = words.pop() if words and not line[-1].isspace() else ""
    if not words:
        found: Iterable[str] = ("--help", "--version", "--completion") if last else ()
        found = found if last.startswith("-") else commands
    elif words == ["--completion"]:
        found = SCRIPTS
    elif words == ["runs"] and not last.startswith("-"):
        found = _COMMANDS.findall(_help(run, words))
    elif words in (["fit"], ["tune"]) and not last.startswith("-"):
        found = _recipes(last)
    elif words == ["fit"]:
        found = ("--config", "--resume", "--list", "--help")
    elif last.startswith("-"):
        found = _options(run, words)
    else:
        found = ()
    return [each for each in found if each.startswith(last)]


def _help(run: Callable[[Sequence[str]], int], words: Sequence[str]) -> str:
    os.environ["COLUMNS"] = "80"  # wider help has options side by side
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.suppress(SystemExit),
    ):
        run([*words, "--help"])
    return out.getvalue()


def _options(run: Callable[[Sequence[str]], int], words: Sequence[str]) -> list[str]:
    """Returns the options of a command."""
    if words[0] == "fit" and ":" in words[1]:
        return _parameters(words[1])
    depth = 2 if words[0] in ("fit", "tune", "runs") else 1
    lists = _OPTIONS.findall(_help(run, words[:depth]))
    return [option for each in lists for option in each.split(", ")]


def _recipes(last: str) -> list[str]:
    """Returns the built-in recipes, or after `file.py:` the functions and classes of that file."""
    from distaff.cli.recipes import RECIPES

    place, colon, _ = last.rpartition(":")
    if not colon:
        return [*RECIPES]
    names = [node.name for node in _definitions(place) if not node.name.startswith("_")]
    return [f"{place}:{name}" for name in names]


def _parameters(recipe: str) -> list[str]:
    """Returns the options of a recipe in a file, which is read and not run."""
    place, _, name = recipe.rpartition(":")
    for node in _definitions(place):
        if node.name == name:
            if isinstance(node, ast.FunctionDef):
                names = [each.arg for each in (*node.args.args, *node.args.kwonlyargs)]
            else:
                fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
                names = [each.target.id for each in fields if isinstance(each.target, ast.Name)]
            return [f"--{each.replace('_', '-')}" for each in (*names, "help")]
    return []


def _definitions(place: str) -> list[ast.FunctionDef | ast.ClassDef]:
    try:
        body = ast.parse(Path(place).read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return []
    return [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]

"""The command line, `distaff`: trains recipes, and lists, compares and removes runs.

A module of a command is imported when that command runs, so that help takes no second.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType

import distaff
from distaff.errors import ConfigError, DistaffError, nearest

_USAGE = """usage: distaff COMMAND [OPTIONS]

commands:
  new NAME         make a project: recipe, model, test, Makefile
  fit RECIPE       train a recipe, such as `digits` or `train.py:main`
  tune RECIPE      search for the best options of a recipe
  plan RECIPE      show the memory, traffic and time that a training needs
  launch RECIPE    train it in several processes of this machine
  eval RUN DATA    evaluate a trained model
  predict RUN DATA write its outputs
  export RUN DIR   export it to run without Distaff
  serve RUN        serve it over HTTP
  report RUN ...   write an HTML report of one or several runs
  watch RUN        show a run that trains elsewhere
  runs COMMAND     list, show, compare, tag, archive and remove runs
  env              print versions and devices

options:
  -h, --help         print this help; `distaff COMMAND --help` has the help of a command
  --version          print the version
  --completion SHELL print the completion script of bash, zsh or fish

exit status: 0 if the command succeeded, 1 if a training failed, 2 for a wrong command or option,
130 after Ctrl-C, 143 after SIGTERM
"""


def _env(words: Sequence[str]) -> int:
    if list(words) in (["-h"], ["--help"]):
        print("usage: distaff env\n\nPrints versions and devices.\n\n  -h, --help  print this help")
        return 0
    if words:
        raise ConfigError(f"`distaff env` takes no arguments; got {' '.join(words)!r}.")
    from distaff.run.directory import environment

    facts = environment.describe()
    for name, version in {"python": facts["python"], **facts["packages"]}.items():
        print(f"{name:<18} {version}")
    devices = facts["devices"]
    print(f"{'platform':<18} {facts['platform']}")
    print(f"{'devices':<18} {devices['count']} x {devices['kind']}")
    return 0


def _in(module: str, name: str = "main") -> Callable[[Sequence[str]], int]:
    """Returns a command that imports its module when it runs."""
    return lambda words: getattr(import_module(f"distaff.cli.{module}"), name)(words)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "new": _in("new"),
    "fit": _in("fit"),
    "tune": _in("tune"),
    "plan": _in("plan"),
    "launch": _in("launch"),
    "eval": _in("inference", "eval_main"),
    "predict": _in("inference", "predict_main"),
    "export": _in("inference", "export_main"),
    "serve": _in("serve"),
    "report": _in("report"),
    "watch": _in("watch"),
    "runs": _in("runs"),
    "env": _env,
}
"""Commands by name: functions of the further arguments that return the exit status."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: the arguments after `distaff`; defaults to `sys.argv[1:]`.

    Returns:
        The exit status: 0, 1 for a training that failed, 2 for a wrong command or option, 130
        after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = _run(words or ["--help"])
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except DistaffError as error:
        return _failed(str(error), 2 if isinstance(error, (ValueError, ImportError)) else 1)
    except KeyboardInterrupt:  # a training ends by itself, and returns its result
        return _failed("Interrupted by Ctrl-C.", 130)
    except BrokenPipeError:  # such as `distaff runs list | head`
        sys.stderr.close()
        return 0
    except OSError as error:
        if words[0] in ("fit", "tune"):  # of a recipe, whose traceback is needed
            raise
        return _failed(f"{error}. Free some space, or check the permissions.", 1)


def _run(words: Sequence[str]) -> int:
    first, *rest = words
    if first in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if first in ("-V", "--version"):
        print(f"distaff {distaff.__version__}")
        return 0
    if first == "--completion":
        if len(rest) != 1:
            raise ConfigError("--completion needs the name of a shell: bash, zsh or fish.")
        print(_completion().script(rest[0]), end="")
        return 0
    if first == "--complete":  # what that script calls
        for word in _completion().candidates(" ".join(rest), COMMANDS, main):
            print(word)
        return 0
    if first not in COMMANDS:
        raise ConfigError(f"There is no command {first!r}. {nearest(first, COMMANDS)}")
    return COMMANDS[first](rest)


def _completion() -> ModuleType:
    return import_module("distaff.cli.completion")


def _failed(message: str, status: int) -> int:
    print(f"distaff: {message}", file=sys.stderr)
    if "jax" in sys.modules:
        import_module("distaff.distributed.failure").leave(status)
    return status

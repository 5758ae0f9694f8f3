"""Finds recipes: built-in ones, and functions or dataclasses of your own."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from distaff.errors import ConfigError, nearest


class Recipe(NamedTuple):
    """A built-in recipe, whose module is imported when it is used.

    Attributes:
        module: its module.
        name: a dataclass of options with a `run` method.
        summary: the first line of its docstring.
    """

    module: str
    name: str
    summary: str


RECIPES = {
    "digits": Recipe(
        "distaff.cli.digits",
        "Digits",
        "Trains a small CNN on the 1,797 handwritten digits of scikit-learn.",
    )
}
"""Built-in recipes by name."""


def find(name: str) -> Callable[..., Any]:
    """Returns a recipe: a function, or a dataclass with a method `run`.

    Args:
        name: a built-in name, `file.py:function`, or `package.module:function`.

    Raises:
        ConfigError: there is no such recipe.
    """
    if name in RECIPES:
        return getattr(importlib.import_module(RECIPES[name].module), RECIPES[name].name)
    place, colon, attribute = name.rpartition(":")
    if not colon:
        hint = f"{name}:main" if name.endswith(".py") else "train.py:main"
        raise ConfigError(
            f"There is no recipe {name!r}. {nearest(name, RECIPES)} For a function of your own, "
            f"write its file and name, such as {hint!r}."
        )
    return _checked(load_code(place), attribute, name)


def load_code(place: str) -> ModuleType:
    """Imports a file, such as train.py, or a module, such as package.module.

    Raises:
        ConfigError: there is no such file or module.
    """
    return _load_file(Path(place)) if place.endswith(".py") else _import(place)


def _checked(module: ModuleType, attribute: str, name: str) -> Callable[..., Any]:
    own = {
        key: value
        for key, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    }
    found = getattr(module, attribute, None)
    if not callable(found):
        raise ConfigError(
            f"There is no function {attribute!r} in {name!r}. {nearest(attribute, own)}"
        )
    if inspect.isclass(found) and not callable(getattr(found, "run", None)):
        raise ConfigError(
            f"A recipe is a function, or a dataclass with a method `run`; {attribute!r} is a class "
            "without one. Add `def run(self)`, or name a function."
        )
    return found


def _import(place: str) -> ModuleType:
    sys.path.insert(0, "")  # as `python -m` does
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"There is no module {place!r}. Check the name, and run the command in the folder "
            "that contains it."
        ) from error
    finally:
        sys.path.remove("")


def _load_file(path: Path) -> ModuleType:
    """Imports a file as the module of its name, with its folder first on the path."""
    if not path.is_file():
        raise ConfigError(f"There is no file {str(path)!r}. Check the path.")
    # A file may have the name of a module that is imported already, such as random.py.
    name = f"recipe_{path.stem}" if path.stem in sys.modules else path.stem
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise ConfigError(f"{str(path)!r} is not a Python file.")
    sys.path.insert(0, str(path.resolve().parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and checkpoints look it up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module

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

from distaff.errors import ConfigError, MissingExtraError, nearest


class Recipe(NamedTuple):
    """A built-in recipe, which is imported when it is used.

    Attributes:
        place: its module, or its file in the folder `examples`.
        summary: what it does, in one line.
        extras: the extras of Distaff that it needs.
        name: a function, or a dataclass of options with a `run` method.
    """

    place: str
    summary: str
    extras: tuple[str, ...] = ()
    name: str = "main"

    @property
    def install(self) -> str:
        """What to install for it, such as "distaff[digits,plots]"."""
        return f"distaff[{','.join(self.extras)}]" if self.extras else "distaff"


RECIPES = {
    "digits": Recipe(
        "distaff.cli.digits",
        "Trains a small CNN on the 1,797 handwritten digits of scikit-learn.",
        ("digits", "plots"),
        "Digits",
    ),
    "augmentation": Recipe(
        "augmentation.py",
        "Learns 200 digits, as they are and shifted in every step.",
        ("digits",),
    ),
    "autoencoder": Recipe(
        "autoencoder.py",
        "Encodes digits in 2 to 32 numbers, alongside PCA.",
        ("digits", "plots"),
    ),
    "big-batches": Recipe(
        "big_batches.py",
        "Accumulates gradients in bfloat16, clips them, and averages the weights.",
        ("digits",),
    ),
    "diabetes-folds": Recipe(
        "diabetes_folds.py",
        "Cross-validates a small network on 442 patients.",
        ("folds",),
    ),
    "digits-resnet": Recipe(
        "digits_resnet.py",
        "Trains a ResNet on digits, or on the images of MNIST or CIFAR.",
        ("digits", "plots"),
    ),
    "ensemble": Recipe(
        "ensemble.py",
        "Trains 100 small networks at once, each on its own bootstrap sample.",
        ("plots",),
    ),
    "finder": Recipe(
        "finder.py",
        "Finds a learning rate and a batch size before a training.",
        ("digits", "plots"),
    ),
    "fine-tuning": Recipe(
        "fine_tuning.py",
        "Fine-tunes a network of ten digits to tell odd from even.",
        ("digits",),
    ),
    "gan": Recipe(
        "gan.py",
        "Trains a GAN on a ring of eight Gaussians.",
    ),
    "imbalanced-digits": Recipe(
        "imbalanced_digits.py",
        "Weights the classes of digits, one of which is rare.",
        ("digits",),
    ),
    "language-model": Recipe(
        "language_model.py",
        "Trains a small GPT on Python source, byte by byte.",
        ("plots",),
    ),
    "learned-optimizer": Recipe(
        "learned_optimizer.py",
        "Trains a learned optimizer, then a network with it.",
        ("digits",),
    ),
    "linear-probe": Recipe(
        "linear_probe.py",
        "Trains a linear layer on the codes of an autoencoder.",
        ("digits", "plots"),
    ),
    "sine-regression": Recipe(
        "sine_regression.py",
        "Fits a sine with a small network, once per seed.",
        ("plots",),
    ),
    "tabular-regression": Recipe(
        "tabular_regression.py",
        "Predicts the progress of a disease from a table of patients.",
        ("digits",),
    ),
    "text-classification": Recipe(
        "text_classification.py",
        "Classifies passages of text by their characters.",
    ),
    "tuning": Recipe(
        "tuning.py",
        "Tunes an MLP on digits with Optuna.",
        ("digits", "plots", "tune"),
    ),
}
"""Built-in recipes by name. All but the first are the programs in `examples/`."""


def find(name: str) -> Callable[..., Any]:
    """Returns a recipe: a function, or a dataclass with a method `run`.

    Args:
        name: a built-in name, `file.py:function`, or `package.module:function`.

    Raises:
        ConfigError: there is no such recipe.
    """
    if name in RECIPES:
        return getattr(_load_recipe(RECIPES[name]), RECIPES[name].name)
    place, colon, attribute = name.rpartition(":")
    if not colon:
        hint = f"{name}:main" if name.endswith(".py") else "train.py:main"
        raise ConfigError(
            f"There is no recipe {name!r}. {nearest(name, RECIPES)} For a function of your own, "
            f"write its file and name, such as {hint!r}."
        )
    return _checked(load_code(place), attribute, name)


def load_code(place: str) -> ModuleType:
    """Imports a file, such as train.py, a module, such as package.module, or a built-in recipe.

    Raises:
        ConfigError: there is no such file or module.
        MissingExtraError: a built-in recipe needs a package that is not installed.
    """
    if place in RECIPES:
        return _load_recipe(RECIPES[place])
    return _load_file(Path(place)) if place.endswith(".py") else _import(place)


def _load_recipe(recipe: Recipe) -> ModuleType:
    """Imports a built-in recipe, from the installed package or from a checkout.

    Raises:
        MissingExtraError: it needs a package that is not installed.
    """
    here = Path(__file__)
    folders = (here.with_name("examples"), here.parents[3] / "examples")
    files = [file for folder in folders if (file := folder / recipe.place).is_file()]
    try:
        return _load_file(files[0]) if files else importlib.import_module(recipe.place)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("distaff"):
            raise
        raise MissingExtraError(
            f"This recipe needs the package {error.name!r}, which is not installed. Install it "
            f'with: pip install "{recipe.install}"'
        ) from error


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

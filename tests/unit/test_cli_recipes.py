"""Recipes of your own on the command line: `file.py:function` and `package.module:function`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from distaff import cli
from distaff.run.result import TrainResult

FILE = '''
import dataclasses
import helpers  # beside this file

@dataclasses.dataclass
class Optimizer:
    rate: float = 0.1

def main(width: int, optimizer: Optimizer = Optimizer(), name: str = "run") -> None:
    """Trains a net.

    Args:
        width: units of the layer.
        optimizer: how to train.
        name: name of the run.
    """
    print(helpers.TEXT, width, optimizer.rate, name, __name__)

@dataclasses.dataclass
class Recipe:
    """A dataclass."""
    depth: int = 2

    def run(self):
        print("depth", self.depth)

class Plain:
    pass

def of_options(options: Optimizer) -> None:
    print("rate", options.rate)

number = 3
raise_at_import = None
if __name__ == "__main__":
    raise AssertionError("imported, not run")
'''


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "my project"
    folder.mkdir()
    (folder / "train.py").write_text(FILE)
    (folder / "helpers.py").write_text("TEXT = 'helped'")
    package = tmp_path / "pack"
    package.mkdir()
    (package / "inner.py").write_text("def go(seed: int = 0) -> None:\n    print('seed', seed)\n")
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("train", "helpers", "pack", "broken"):
            del sys.modules[name]


def test_function_of_a_file_gets_its_parameters_as_options(capsys):
    words = ("--width", "8", "--optimizer.rate", "0.5")
    assert cli.main(("fit", "my project/train.py:main", *words)) == 0
    assert capsys.readouterr().out == "helped 8 0.5 run train\n"


def test_help_of_a_recipe_comes_from_its_docstring(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(("fit", "my project/train.py:main", "--help"))
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert all(part in out for part in ("Trains a net.", "units of the layer", "--optimizer.rate"))


def test_fields_of_an_only_dataclass_are_the_options(capsys):
    assert cli.main(("fit", "my project/train.py:of_options", "--rate", "0.5")) == 0
    assert capsys.readouterr().out == "rate 0.5\n"


def test_dataclass_with_run_is_a_recipe(capsys):
    assert cli.main(("fit", "my project/train.py:Recipe", "--depth", "5")) == 0
    assert capsys.readouterr().out == "depth 5\n"


def test_function_of_a_package_is_found_in_the_current_folder(capsys):
    assert cli.main(("fit", "pack.inner:go", "--seed", "4")) == 0
    assert capsys.readouterr().out == "seed 4\n"
    assert "" not in sys.path


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        ("my project/train.py", ("no recipe", "'my project/train.py:main'")),
        ("my project/train.py:mian", ("no function 'mian'", "Did you mean 'main'?")),
        ("my project/train.py:number", ("no function 'number'",)),
        ("my project/train.py:Plain", ("method `run`", "'Plain'")),
        ("gone.py:main", ("no file 'gone.py'",)),
        ("pack.gone:main", ("no module 'pack.gone'",)),
        ("nowhere.at.all:main", ("no module 'nowhere.at.all'",)),
        ("digit", ("no recipe 'digit'", "Did you mean 'digits'?", "train.py:main")),
    ],
)
def test_wrong_recipes_are_errors(recipe, parts, capsys):
    assert cli.main(("fit", recipe)) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in parts)


def test_file_may_have_the_name_of_an_imported_module(here, capsys):
    random = sys.modules["random"]
    (here / "random.py").write_text("def main() -> None:\n    print(__name__)\n")
    assert cli.main(("fit", "random.py:main")) == 0
    assert capsys.readouterr().out == "recipe_random\n"
    assert sys.modules["random"] is random
    del sys.modules["recipe_random"]


def test_missing_import_of_a_recipe_is_its_own_error(here):
    (here / "broken.py").write_text("import not_installed_anywhere\n")
    for recipe in ("broken.py:main", "broken:main"):
        with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
            cli.main(("fit", recipe))


@pytest.mark.parametrize(
    ("status", "reason", "expected"),
    [("finished", "", 0), ("interrupted", "Ctrl-C", 130), ("interrupted", "max_time=1h", 0)],
)
def test_status_after_a_training(status, reason, expected, monkeypatch):
    result = TrainResult(status, reason, step=3, epoch=1, metrics={}, best=None, path=None)
    monkeypatch.setattr("distaff.cli.fit.find", lambda name: lambda: result)
    assert cli.main(("fit", "any")) == expected


def test_version_and_environment(capsys):
    assert cli.main(("--version",)) == 0
    assert capsys.readouterr().out == f"distaff {cli.distaff.__version__}\n"
    assert cli.main(("env",)) == 0
    out = capsys.readouterr().out
    assert all(part in out for part in ("python", "jax", "devices"))
    assert cli.main(("env", "more")) == 2


def test_simple_namespace_is_no_result(monkeypatch):
    found = SimpleNamespace(status="interrupted", reason="Ctrl-C")
    monkeypatch.setattr("distaff.cli.fit.find", lambda name: lambda: found)
    assert cli.main(("fit", "any")) == 0

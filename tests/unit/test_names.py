"""The names of `distaff`: loaded when they are first used, the same for type checkers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import distaff


def test_type_checkers_see_the_names_that_are_loaded():
    (block,) = (
        node
        for node in ast.parse(Path(distaff.__file__).read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {}
    for node in block.body:
        if isinstance(node, ast.ImportFrom):
            seen |= {alias.name: node.module for alias in node.names}
    places = {
        name: f"distaff.{place}" for place, names in distaff._PLACES.items() for name in names
    }
    packages = dict.fromkeys(set(distaff.__all__) - set(places), "distaff")
    assert seen == {**places, **packages}
    assert set(distaff.__all__) <= set(dir(distaff))


def test_unknown_name_raises_and_names_like_it():
    with pytest.raises(AttributeError, match=r"no attribute 'TrainerModul'.*'TrainerModule'"):
        _ = distaff.TrainerModul
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from distaff import nothing  # noqa: F401


@pytest.mark.slow_but("name first")
@pytest.mark.parametrize(
    "code",
    [
        pytest.param(
            "import distaff; before = 'jax' in sys.modules; distaff.TrainerModule; distaff.trainer",
            id="name first",
        ),
        "before = False; from distaff.trainer.module import TrainerModule; from distaff import EMA",
        "before = False; import distaff.tune, distaff; distaff.run.loop",
        "before = False; from distaff import *; TrainerModule, data.ArrayLoader",
    ],
)
def test_names_load_in_any_order(code):
    finished = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print(before, 'jax' in sys.modules)"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert finished.stdout == "False True\n", finished.stderr

"""The version that a program can ask for."""

from __future__ import annotations

import tomllib
from pathlib import Path

import distaff


def test_version_is_that_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert distaff.__version__ == project["project"]["version"]

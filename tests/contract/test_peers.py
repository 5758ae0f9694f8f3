"""What `make test-peers` installs, and that it skips nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OTHERS = {"pillow", "pyarrow"}  # as the file says


def pins(path: str) -> dict[str, str]:
    lines = (ROOT / path).read_text().splitlines()
    pinned = [line.split("==") for line in lines if line and line[0] != "#"]
    return {re.sub("[-_.]+", "-", name).lower(): version for name, version in pinned}


def test_requirements_are_the_pins_of_the_constraints_with_two_exceptions() -> None:
    required, constraints = pins("tests/requirements-peers.txt"), pins("constraints/py311.txt")
    assert constraints.keys() <= required.keys()
    assert {name for name, pin in constraints.items() if required[name] != pin} == OTHERS


@pytest.mark.slow
@pytest.mark.parametrize("is_required", [False, True])
def test_test_of_a_missing_package_is_skipped_or_fails(tmp_path: Path, is_required: bool) -> None:
    test = tmp_path / "test_missing.py"
    test.write_text(
        "import pytest\n"
        "@pytest.mark.peer('no_such_package')\n"
        "def test_missing(): raise AssertionError\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"}
    environment["DISTAFF_REQUIRE_PEERS"] = "1" if is_required else ""
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-c", ROOT / "pyproject.toml", test],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert found.returncode == is_required, found.stdout + found.stderr
    assert ("1 error" if is_required else "1 skipped") in found.stdout  # before it is called
    assert "needs no_such_package: make test-peers" in found.stdout

"""The garbage collector skips what imports have made, and nothing of the user's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

REPORT = "print(gc.isenabled(), gc.get_freeze_count() > 10_000)"


def said(code: str, **environment: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_imports_are_spared_and_the_collector_is_on_again() -> None:
    code = f"import gc, distaff; distaff.data; {REPORT}; print(gc.get_stats()[2])"
    first, stats = said(code).splitlines()
    assert first == "True True"
    assert "'collections': 0" in stats


def test_imports_are_spared_whichever_module_is_the_first() -> None:
    code = f"""
import gc, sys
import distaff.errors, distaff.core.paths
assert gc.get_freeze_count() == 0 and "jax" not in sys.modules
from distaff.tasks import Classifier
{REPORT}
print(gc.get_stats()[2]["collections"], Classifier.__module__)
import distaff
assert distaff.tasks.Classifier is Classifier
"""
    assert said(code).splitlines() == ["True True", "0 distaff.tasks.classifier"]


@pytest.mark.parametrize(
    ("code", "environment", "expected"),
    [
        ("import gc, jax; from distaff import data", {}, "True False"),
        ("import gc; gc.disable(); from distaff import data", {}, "False False"),
        ("import gc; from distaff import data", {"DISTAFF_GC": "off"}, "True False"),
        ("import gc, jax; from distaff.tasks import Classifier", {}, "True False"),
    ],
)
def test_collector_is_left_alone_where_the_user_has_objects_or_says_so(
    code: str, environment: dict[str, str], expected: str
) -> None:
    assert said(f"{code}; {REPORT}", **environment) == expected


def test_import_that_fails_leaves_the_collector_on() -> None:
    code = """
import gc, sys
sys.modules["optax"] = None
try:
    from distaff import TrainerModule
except ImportError:
    print(gc.isenabled(), gc.get_freeze_count())
"""
    assert said(code) == "True 0"

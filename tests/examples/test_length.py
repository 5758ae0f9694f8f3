"""Examples are short, and each has a test."""

from __future__ import annotations

from pathlib import Path

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


def test_examples_are_short() -> None:
    assert EXAMPLES
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) <= 80, path.name


def test_examples_are_tested() -> None:
    for path in EXAMPLES:
        assert (Path(__file__).parent / f"test_{path.stem}.py").exists(), path.name

"""Examples are short, and each has a test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
EVERYDAY = (
    "big_batches",
    "diabetes_folds",
    "finder",
    "fine_tuning",
    "frames",
    "imbalanced_digits",
    "pytorch_weights",
    "tabular_regression",
    "text_classification",
)
BESIDE_KERAS = {
    "finder": 29,
    "fine_tuning": 21,
    "imbalanced_digits": 24,
    "tabular_regression": 18,
    "text_classification": 32,
}


def test_examples_are_short() -> None:
    assert EXAMPLES
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) <= 80, path.name


def test_examples_are_tested() -> None:
    for path in EXAMPLES:
        assert (Path(__file__).parent / f"test_{path.stem}.py").exists(), path.name


def test_everyday_programs_are_shorter() -> None:
    short = [path for path in EXAMPLES if path.stem in EVERYDAY]
    assert len(short) == len(EVERYDAY)
    for path in short:
        assert len(path.read_text().splitlines()) <= 60, path.name


def test_programs_take_no_more_lines_than_their_keras_form() -> None:
    claimed = {}
    for path in EXAMPLES:
        text = path.read_text()
        if claim := re.search(r"Keras\s+form\s+takes\s+(\d+)\s+lines", text):
            claimed[path.stem] = int(claim[1])
            assert code_lines(text) <= int(claim[1]), path.name
    assert claimed == BESIDE_KERAS


def code_lines(source: str) -> int:
    """Counts the lines of a program without its docstring, imports, comments and blank lines."""
    tree = ast.parse(source)
    skipped = [each for each in tree.body if isinstance(each, ast.Import | ast.ImportFrom)]
    without = set()
    for node in (tree.body[0], *skipped):
        assert node.end_lineno is not None
        without |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    texts = [line.strip() for number, line in lines if number not in without]
    return sum(bool(text) and not text.startswith("#") for text in texts)


def test_code_lines_are_counted_as_said() -> None:
    source = (
        '"""Doc.\n\nMore."""\n\nimport a\nfrom b import (\n    c,\n)\n\n# Why.\nx = [\n    1,\n]\n'
    )
    assert code_lines(source) == 3

"""Plain English in the package: words and turns that a reader must read twice.

Docstrings, comments and messages say what the reader does or gets, with the field's own words:
resume, again, alongside, custom; returns, raises, runs, saves, restores, skips, rolls back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import distaff

PACKAGE = Path(distaff.__file__).parent

TURNS = re.compile(
    r"\bgo(es|ing|ne)? on\b|\bgone back\b|\bput back\b|\banew\b|\bwho wants\b|\bof one's own\b"
    r"|\bwhat (a |an |the )?\w+ leads to|\bis (refused|said|told|warned of|named) |\bhears\b"
    r"|\btells\b(?! apart)|\bcomes? to (its|an) end|\bcame to its end|\bso as it\b"
    r"|\bthe like\b",
    re.IGNORECASE,
)
"""Each with a plainer form: continue, roll back, restore, again, to, your own, what to do ..."""

CAREFUL = re.compile(r"\bis none\b|\bthose of\b")
"""These have a use of their own, so a line that needs one is listed below."""

ALLOWED = ("and those of its parts",)
"""Where the words are idiomatic: a second object."""


def hits(text: str) -> Iterator[str]:
    """Yields the lines of a source that are to be put plainly."""
    for line in text.splitlines():
        if TURNS.search(line) or CAREFUL.search(line):
            yield line.strip()


@pytest.mark.parametrize("folder", ["examples", "benchmarks", "site"])
def test_programs_around_the_package_are_in_plain_words(folder: str) -> None:
    sources = sorted((Path(__file__).parents[1] / folder).rglob("*.py"))
    found = [
        f"{source.name}: {line.strip()}"
        for source in sources
        for line in source.read_text("utf-8").splitlines()
        if TURNS.search(line)
    ]
    assert sources
    assert found == []


@pytest.mark.parametrize("path", sorted(PACKAGE.iterdir()), ids=lambda path: path.name)
def test_package_is_in_plain_words(path: Path) -> None:
    sources = [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))
    found = [
        f"{source.relative_to(PACKAGE)}: {line}"
        for source in sources
        for line in hits(source.read_text("utf-8"))
        if not any(each in line for each in ALLOWED)
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "# The run goes on with the next batch.",
        '"""Hears how long each step took."""',
        'raise ConfigError("A tuple is refused here.")',
        "# Who wants more passes a list.",
        '"""Tells whether it is there."""',
    ],
)
def test_rule_finds_what_must_be_read_twice(line: str) -> None:
    assert list(hits(line)) == [line]


def test_rule_leaves_plain_lines_alone() -> None:
    text = '"""Resumes the run; a key tells apart runs of one program."""\nif x is None:\n    pass'
    assert list(hits(text)) == []

"""The programs of the page that compares frameworks: they run, and are as long as it says."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "compare" / "one-program.md"
TEXT = PAGE.read_text("utf-8")
PROGRAMS = dict(re.findall(r"^## (.+)\n\n<!-- .+ -->\n```python\n((?s:.*?))^```$", TEXT, re.M))
ROWS = {
    name.lower(): (int(lines), float(accuracy))
    for name, lines, accuracy in re.findall(
        r"^\| \[(.+)\]\(.+?\).*? \| (\d+) \| (0\.\d+) \|", TEXT, re.M
    )
}
NOT_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
IMAGES = 360
"""Images of the test split."""


def lines_of_code(program: str) -> int:
    """Returns the number of lines that are neither blank nor only a comment."""
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(program).readline):
        if token.type not in (*NOT_CODE, tokenize.ENDMARKER):
            found |= set(range(token.start[0], token.end[0] + 1))
    return len(found)


def check(name: str, printed: str) -> None:
    """Checks the accuracy that a program printed last: as on the page, but for a few images."""
    accuracy = float(printed.splitlines()[-1])
    assert accuracy == pytest.approx(ROWS[name.lower()][1], abs=8 / IMAGES)


def test_table_has_the_length_of_each_program() -> None:
    assert ROWS.keys() == {name.lower() for name in PROGRAMS}
    assert len(PROGRAMS) == 5
    for name, program in PROGRAMS.items():
        assert ROWS[name.lower()][0] == lines_of_code(program), name
    assert ROWS["distaff"][0] <= 30
    assert lines_of_code("x = (  # a\n\n    1\n)\n# b\n") == 3


@pytest.mark.slow_but("Distaff")
@pytest.mark.parametrize("name", ["Distaff", "Raw Flax"])
def test_program_on_jax_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(PROGRAMS[name], str(PAGE), "exec"), {"__name__": "digits_program"})
    check(name, capsys.readouterr().out)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("Keras", marks=pytest.mark.peer("keras")),
        pytest.param("PyTorch Lightning", marks=pytest.mark.peer("lightning", "torchmetrics")),
    ],
)
def test_program_of_a_peer_runs(name: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAMS[name]], capture_output=True, text=True, timeout=900
    )
    assert finished.returncode == 0, finished.stderr
    check(name, finished.stdout)

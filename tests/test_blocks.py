"""Runs the Python blocks of the README and of the documentation, as a reader would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = [ROOT / "docs" / name for name in ("concepts", "howto", "tutorials")]
SHORT = [
    page
    for folder in FOLDERS
    for page in sorted(folder.glob("*.md"))
    if "<!-- from examples/" not in page.read_text()  # see test_tutorials.py
]
"""Pages of one short program each, which share processes: most of their time is the imports."""

PAGES = [
    page
    for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
    if page.parent not in FOLDERS and "```python" in page.read_text()
]

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\S*).*\n(?P<code>(?s:.*?))^(?P=indent)```$", re.MULTILINE
)
SKIPPED = re.compile(r"<!-- no-run: (?P<reason>.+?) -->\s*\Z")

# The page's own name and line numbers stand in the traceback of a block that fails.
RUN = "import sys; exec(compile(sys.stdin.read(), sys.argv[1], 'exec'))"
RUN_EACH = """
import json, os, sys
for number, (page, code) in enumerate(json.load(sys.stdin)):
    os.makedirs(folder := os.path.abspath(str(number)))
    os.chdir(folder)
    exec(compile(code, page, "exec"), {"__name__": "__main__"})
    os.chdir("..")
"""
# A test run that was killed may have left half an entry in the compile cache.
STRICT = ("-W", "error", "-W", "ignore:Error reading persistent compilation cache entry")


class Block(NamedTuple):
    """One fenced Python block."""

    line: int
    code: str
    skip_reason: str | None


def python_blocks(text: str) -> list[Block]:
    """Returns the Python blocks of a Markdown page in order, `line` counting from 0."""
    blocks = []
    for fence in FENCE.finditer(text):
        if fence["language"] != "python":
            continue
        skipped = SKIPPED.search(text, 0, fence.start())
        code = textwrap.dedent(fence["code"])
        line = text.count("\n", 0, fence.start("code"))
        blocks.append(Block(line, code, skipped["reason"] if skipped else None))
    return blocks


def script(blocks: list[Block]) -> str:
    """Returns one program with each block that runs at the line it has in its page."""
    lines: list[str] = []
    for block in blocks:
        if block.skip_reason is None:
            lines += [""] * (block.line - len(lines))
            lines += block.code.splitlines()
    return "\n".join(lines)


def run(program: str, given: str, directory: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in a new process, in `directory`."""
    return subprocess.run(
        [sys.executable, *STRICT, "-c", program, *args],
        input=given,
        capture_output=True,
        text=True,
        cwd=directory,
        env=os.environ | {"MPLBACKEND": "agg"},
        timeout=280,
    )


def run_page(page: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    """Runs the blocks of one page."""
    return run(RUN, script(python_blocks(page.read_text())), directory, str(page))


def run_pages(pages: list[Path], directory: Path) -> subprocess.CompletedProcess[str]:
    """Runs the blocks of pages in turn, each with names and a folder of its own."""
    scripts = [(str(page), script(python_blocks(page.read_text()))) for page in pages]
    return run(RUN_EACH, json.dumps(scripts), directory)


# A page trains for a minute or two.
@pytest.mark.slow_but("README.md")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_of_page_run(page: Path, tmp_path: Path) -> None:
    blocks = python_blocks(page.read_text())
    if all(block.skip_reason for block in blocks):
        reasons = "; ".join(f"line {block.line}: {block.skip_reason}" for block in blocks)
        pytest.skip(reasons)
    finished = run_page(page, tmp_path)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.slow
@pytest.mark.parametrize("share", range(3))
def test_blocks_of_short_pages_run(share: int, tmp_path: Path) -> None:
    finished = run_pages(SHORT[share::3], tmp_path)
    assert finished.returncode == 0, finished.stderr


def test_short_pages_share_no_names(tmp_path: Path) -> None:
    pages = [tmp_path / "a.md", tmp_path / "b.md"]
    pages[0].write_text("```python\nx = 1\nopen('x', 'w').close()\n```\n")
    pages[1].write_text("```python\nimport os\nprint(os.listdir())\n```\n\n```python\nx\n```\n")
    finished = run_pages(pages, tmp_path / ".")
    assert finished.stdout == "[]\n"
    assert f'{pages[1]}", line 7' in finished.stderr
    assert "NameError" in finished.stderr


def test_readme_has_blocks_that_run() -> None:
    assert any(not block.skip_reason for block in python_blocks(PAGES[0].read_text()))


def test_blocks_share_names_and_skip_other_fences(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx = 1\n```\n"
        "```sh\nfalse\n```\n"
        "<!-- no-run: needs a GPU -->\n\n```python\nx = 2\n```\n"
        "1. In a list:\n\n   ```python\n   print(x)\n   ```\n"
    )
    finished = run_page(page, tmp_path)
    assert (finished.stdout, finished.stderr) == ("1\n", "")
    assert [block.skip_reason for block in python_blocks(page.read_text())] == [
        None,
        "needs a GPU",
        None,
    ]


@pytest.mark.parametrize(
    "wrong", ["raise ValueError('no')", "import warnings; warnings.warn('no')"]
)
def test_blocks_fail_with_line_of_page(wrong: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n```python\nx = 1\n```\n\n```python\n{wrong}\n```\n")
    finished = run_page(page, tmp_path)
    assert finished.returncode == 1
    assert f'{page}", line 8' in finished.stderr

"""Executes the tutorials as notebooks, and writes what each cell shows into its page.

    .venv/bin/python site/tutorials.py [NAME ...]

A tutorial is `docs/tutorials/NAME.md`. It explains an example: a comment such as
`<!-- from examples/gan.py: imports RING GAN -->` names the pieces that the next block shows.
"""

from __future__ import annotations

import ast
import base64
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
IMAGES = ROOT / "docs" / "images" / "tutorials"

SHOWN = re.compile(r"(<!-- from (\S+): ([\w ]+) -->\n\n?```python\n)(.*?)(^```$)", re.M | re.S)
OUTPUT = re.compile(r"\n<!-- output -->\n.*?<!-- end -->\n", re.S)
CELL = re.compile(r"^```python\n(.*?)^```$\n", re.M | re.S)
MOST_LINES = 40
"""Of an output; longer ones are cut in the middle."""


def pieces(source: str, names: list[str]) -> str:
    """Returns the statements of a program that define `names`; `imports` are all but tyro's."""
    lines, found = source.splitlines(), {"imports": []}
    for node in ast.parse(source).body:
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
        code = "\n".join(lines[first - 1 : node.end_lineno])
        if isinstance(node, ast.Import | ast.ImportFrom):
            if not re.search(r"__future__|tyro", code):
                gap = "" if lines[first - 2] else "\n"  # between groups of imports
                found["imports"].append(gap + code)
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = [code]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = [code]
    return "\n".join("\n".join(found[name]) for name in names).lstrip()


def with_code(text: str) -> str:
    """Returns a page whose blocks show the examples as they are."""
    ruff = [sys.executable, "-m", "ruff", "format", "--config", TUTORIALS / ".ruff.toml", "-"]

    def shown(match: re.Match[str]) -> str:
        code = pieces((ROOT / match[2]).read_text("utf-8"), match[3].split())
        done = subprocess.run(ruff, input=code, capture_output=True, text=True, check=True)
        return match[1] + done.stdout + match[5]

    return SHOWN.sub(shown, text)


def executed(codes: list[str], folder: str) -> list[list[Any]]:
    """Returns the outputs of cells, run by one kernel in `folder`."""
    import nbclient
    import nbformat

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in codes])
    nbclient.NotebookClient(
        book, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}
    ).execute()
    return [cell.outputs for cell in book.cells]


def rendered(outputs: list[Any], image: str) -> Iterator[str]:
    """Yields the Markdown of a cell's outputs, and writes a picture to `image`."""
    texts = []
    for output in outputs:
        shown = output.get("data", {})
        if "image/png" in shown:
            IMAGES.mkdir(parents=True, exist_ok=True)
            (IMAGES / image).write_bytes(base64.b64decode(shown["image/png"]))
            yield f"![Output](../images/tutorials/{image})\n"
        elif output.get("name") != "stderr":
            texts.append(output.get("text") or shown["text/plain"])
    lines = [line.rstrip() for line in "\n".join(texts).strip("\n").splitlines()]
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES // 2], "...", *lines[-MOST_LINES // 2 :]]
    if lines:
        yield "\n".join(["```text", *lines, "```\n"])


def with_outputs(text: str, name: str) -> str:
    """Returns a page with the outputs of its cells, run in an empty folder."""
    text = OUTPUT.sub("", text)
    with tempfile.TemporaryDirectory() as folder:
        every = executed([match[1] for match in CELL.finditer(text)], folder)
    place, numbered = f"{Path(folder).resolve()}/", iter(enumerate(every, 1))

    def shown(match: re.Match[str]) -> str:
        number, outputs = next(numbered)
        parts = [x.replace(place, "") for x in rendered(outputs, f"{name}-{number}.png")]
        return match[0] + ("\n<!-- output -->\n" + "\n".join(parts) + "<!-- end -->\n") * bool(
            parts
        )

    return CELL.sub(shown, text)


def main() -> None:
    """Executes the named tutorials, or all."""
    for name in sys.argv[1:] or sorted(path.stem for path in TUTORIALS.glob("*.md")):
        page = TUTORIALS / f"{name}.md"
        page.write_text(with_outputs(with_code(page.read_text("utf-8")), name), "utf-8")


if __name__ == "__main__":
    main()

"""The tutorials: their code is the examples' own, and their cells run."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("tutorials", ROOT / "site" / "tutorials.py")
assert spec is not None
assert spec.loader is not None
tutorials = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tutorials)

PAGES = sorted(tutorials.TUTORIALS.glob("*.md"))
OF_EXAMPLES = [page for page in PAGES if "<!-- from " in page.read_text("utf-8")]


@pytest.mark.parametrize("page", OF_EXAMPLES, ids=lambda page: page.stem)
def test_tutorial_shows_its_example(page: Path) -> None:
    blocks = list(tutorials.SHOWN.finditer(page.read_text("utf-8")))
    assert len(blocks) > 1
    for _, example, names, code, _ in map(re.Match.groups, blocks):
        wanted = tutorials.pieces((ROOT / example).read_text("utf-8"), names.split())
        assert ast.dump(ast.parse(code)) == ast.dump(ast.parse(wanted)), names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tutorial_has_outputs_and_pictures(page: Path) -> None:
    text = page.read_text("utf-8")
    assert tutorials.OUTPUT.search(text)
    assert "Traceback" not in text
    shown = re.findall(r"!\[Output\]\((\S+)\)", text)
    assert all((page.parent / picture).exists() for picture in shown)


def test_pieces_of_a_program_are_found() -> None:
    source = "from __future__ import x\n\nimport a\n\nimport b\n\nX = 1\n\n\n@a\ndef f(): ...\n"
    assert tutorials.pieces(source, ["imports", "f"]) == "import a\n\nimport b\n@a\ndef f(): ..."
    with pytest.raises(KeyError, match="Y"):
        tutorials.pieces(source, ["Y"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tabular", "fine-tuning"])
def test_tutorial_runs_as_a_notebook(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    text = (tutorials.TUTORIALS / f"{name}.md").read_text("utf-8")
    short = re.sub(r"num_epochs=\d+", "num_epochs=2", tutorials.OUTPUT.sub("", text))
    cells = [match[1] for match in tutorials.CELL.finditer(short)]
    outputs = tutorials.executed(cells, str(tmp_path))
    assert sum(map(bool, outputs)) == len(tutorials.OUTPUT.findall(text))

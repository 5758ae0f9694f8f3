"""The notebook runs, and each of its cells shows what a reader is told to see."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.ipynb"


def test_the_notebook_is_stored_short_and_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert sum(len(cell["source"]) for cell in cells) <= 60
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
def test_each_cell_shows_one_output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("PYTHONPATH", ":".join(path for path in sys.path if path))
    book = nbformat.read(NOTEBOOK, as_version=4)
    client.NotebookClient(
        book, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [cell.outputs for cell in book.cells if cell.cell_type == "code"]
    assert [len(each) for each in outputs] == [1] * 5, json.dumps(outputs)[:4000]
    loader, run, result, figure, confusion = (each[0].data for each in outputs)
    assert loader["text/plain"].startswith("ArrayLoader(1,257 examples, ")
    assert "<svg" in run["text/html"]
    assert run["text/plain"].count("epoch ") >= 10
    assert result["text/plain"].startswith("TrainResult(finished, step 285, epoch 15, test/")
    accuracy = float(result["text/plain"].partition("test/accuracy ")[2].split(",")[0].rstrip(")"))
    assert accuracy > 0.93  # 0.967 measured
    assert figure["image/png"]
    shown = confusion["text/plain"].splitlines()
    rows = [[int(count) for count in re.findall(r"\d+", line)] for line in shown]
    assert sum(map(sum, rows)) == 360
    assert sum(rows[digit][digit] for digit in range(10)) == pytest.approx(360 * accuracy, abs=0.5)
    assert list(tmp_path.iterdir()) == []

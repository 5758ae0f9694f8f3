"""Every example runs, at a small size, and leaves what it promises."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for the names of their annotations
    spec.loader.exec_module(module)
    return module


def test_examples_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 80, path.name


def test_autoencoder_draws_every_n_epochs(tmp_path: Path) -> None:
    example = load("autoencoder")
    result = example.main(example.Options(num_epochs=4, draw_every=2, root=str(tmp_path)))
    pictures = sorted(path.name for path in (result.path / "images").iterdir())
    assert pictures == ["reconstructions_156.png", "reconstructions_78.png"]
    assert result.metrics["val/psnr"] > 5
    assert "val/psnr" in (result.path / "metrics.jsonl").read_text()

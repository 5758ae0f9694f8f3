"""The language model is measured on the bytes that the compressors are, and writes samples."""

from __future__ import annotations

import gzip
import json
import lzma
import re
from pathlib import Path

import pytest

from distaff import data


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A few files that are easy to predict; argparse.py is tested on, bisect.py validates."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("abc", "ast", "argparse", "bisect", "cmd"):
        lines = [f"def {name}_{i % 7}(x):\n    return x + {i % 5}\n" for i in range(40)]
        (folder / f"{name}.py").write_text("\n".join(lines))
    return folder


@pytest.mark.slow
def test_language_model_beside_the_compressors(example, source, tmp_path, capsys) -> None:
    module = example("language_model")
    options = module.Options(
        num_epochs=2,
        steps_per_epoch=30,
        length=16,
        num_layers=2,
        features=16,
        sample_every=25,
        source=str(source),
        root=str(tmp_path / "runs"),
    )
    bits = module.main(options)
    _, _, test = data.python_source(source)
    assert test == (source / "argparse.py").read_bytes()
    assert bits["gzip -9"] == 8 * len(gzip.compress(test, 9)) / len(test)
    assert bits["xz -9e"] == 8 * len(lzma.compress(test, preset=9 | lzma.PRESET_EXTREME)) / len(
        test
    )
    assert bits["language model"] < 6  # 8 before training

    run = tmp_path / "runs" / "language-model" / "0001"
    assert (
        json.loads((run / "metrics/test.json").read_text())["test/bits_per_byte"]
        == (bits["language model"])
    )
    samples = sorted((run / "texts").iterdir())
    assert [path.name for path in samples] == ["sample_25.txt", "sample_50.txt"]
    assert all(re.match(r"def .{300,}", path.read_text(), re.DOTALL) for path in samples)
    assert (run / "learning_curve.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "\ndef " in printed or printed.startswith("def ")
    assert f"bits per byte of {len(test):,} held-out bytes: {bits}" in printed

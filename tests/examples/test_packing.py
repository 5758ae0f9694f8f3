"""Packed, bucketed and padded batches of functions train on as much text, and are compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Functions of several lengths; bisect.py validates."""
    for name in ("abc", "ast", "argparse", "bisect", "cmd"):
        body = [
            "def {}_{}(x):\n{}    return x\n".format(name, i, "    x += 1\n" * (i % 4))
            for i in range(30)
        ]
        (tmp_path / f"{name}.py").write_text("\n".join(body))
    return tmp_path


def test_functions_are_found_whole_and_cut(example) -> None:
    text = b"import os\n\ndef f(x):\n    y = 1\n\n    return x\n\nz = 3\n"
    text += b"    def g(): # inner\n        pass\n"
    found = [tokens.tobytes() for tokens in example("packing").functions(text, 100)]
    assert found == [
        b"def f(x):\n    y = 1\n\n    return x\n\n",
        b"    def g(): # inner\n        pass\n",
    ]
    assert [len(tokens) for tokens in example("packing").functions(text, 12)] == [12, 12]


@pytest.mark.slow
def test_packing_is_compared_with_padding(example, source, capsys) -> None:
    module = example("packing")
    options = module.Options(
        num_tokens=3000, batch_size=4, length=64, num_layers=1, features=8, source=str(source)
    )
    found = module.main(options)
    assert set(found) == {"packed", "bucketed", "padded"}
    for name, numbers in found.items():
        assert numbers["steps"] == pytest.approx(found["padded"]["steps"], rel=0.5)
        assert numbers["bits_per_byte"] < 8.2, name
        assert np.isfinite(numbers["tokens_per_second"])
    assert "padded {'steps'" in capsys.readouterr().out

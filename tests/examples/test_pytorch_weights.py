"""The file of the example has PyTorch's names and layouts, and both networks predict the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file


@pytest.mark.slow
def test_both_networks_have_the_weights_of_the_file(example, tmp_path: Path) -> None:
    module = example("pytorch_weights")
    scores = module.main(module.Options(num_epochs=3, root=str(tmp_path)))
    assert scores["flax"] > 0.3
    assert scores["equinox"] == pytest.approx(scores["flax"], abs=0.01)
    shapes = {n: x.shape for n, x in load_file(tmp_path / "digits.safetensors").items()}
    assert shapes == {
        "0.weight": (16, 1, 3, 3),
        "0.bias": (16,),
        "2.weight": (32, 16, 3, 3),
        "2.bias": (32,),
        "5.weight": (10, 128),
        "5.bias": (10,),
    }

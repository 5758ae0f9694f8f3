"""The residual network learns digits, draws how, and reads other data sets from a folder."""

from __future__ import annotations

import struct
from pathlib import Path

import jax
import numpy as np
import pytest

from distaff import DistaffError, OptimizerConfig


@pytest.mark.slow
def test_digits_resnet_learns_and_draws(example, tmp_path: Path, capsys) -> None:
    module = example("digits_resnet")
    result = module.main(module.Options(num_epochs=2, root=str(tmp_path)))
    assert result.metrics["test/accuracy"] > 0.8
    assert f"test accuracy {result.metrics['test/accuracy']:.4f}" in capsys.readouterr().out
    pictures = sorted(path.name for path in (result.path / "figures").iterdir())
    assert pictures == ["confusion_matrix.png", "learning_curves.png"]


def test_digits_resnet_shifts_each_picture_by_at_most_an_eighth(example) -> None:
    images = np.random.default_rng(0).uniform(1, 2, (64, 8, 8, 1)).astype(np.float32)
    shifted = np.asarray(example("digits_resnet").shifted(images, jax.random.key(0)))
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    moves = [(y, x) for y in range(3) for x in range(3)]
    found = [
        [move for move in moves if np.array_equal(cut(one, move), moved)]
        for one, moved in zip(padded, shifted, strict=True)
    ]
    assert all(len(each) == 1 for each in found)
    assert {each[0] for each in found} == set(moves)


def cut(picture: np.ndarray, corner: tuple[int, int]) -> np.ndarray:
    y, x = corner
    return picture[y : y + 8, x : x + 8]


@pytest.mark.slow
def test_digits_resnet_reads_mnist_from_a_folder(example, tmp_path: Path) -> None:
    module = example("digits_resnet")
    small = {"num_epochs": 1, "batch_size": 10, "optimizer": OptimizerConfig(learning_rate=1e-3)}
    options = module.Options(data="mnist", folder=tmp_path, root=str(tmp_path / "runs"), **small)
    with pytest.raises(DistaffError, match=r"yann\.lecun\.com"):
        module.main(options)
    assert not (tmp_path / "runs").exists()

    labels = np.arange(30, dtype=np.uint8) % 10
    for split in ("train", "t10k"):
        images = struct.pack(">2x2B3I", 8, 3, 30, 28, 28) + np.repeat(labels, 784).tobytes()
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(images)
        header = struct.pack(">2x2BI", 8, 1, 30)
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    assert "test/accuracy" in module.main(options).metrics

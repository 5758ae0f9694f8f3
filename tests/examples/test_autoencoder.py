"""The autoencoder draws its reconstructions every few epochs."""

from __future__ import annotations

from pathlib import Path


def test_autoencoder_draws_every_n_epochs(example, tmp_path: Path) -> None:
    module = example("autoencoder")
    result = module.main(module.Options(num_epochs=4, draw_every=2, root=str(tmp_path)))
    pictures = sorted(path.name for path in (result.path / "images").iterdir())
    assert pictures == ["reconstructions_156.png", "reconstructions_78.png"]
    assert result.metrics["val/psnr"] > 5
    assert "val/psnr" in (result.path / "metrics.jsonl").read_text()

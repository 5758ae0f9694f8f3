"""Each length of code is a run that draws its reconstructions, and is compared with PCA."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition import PCA

from distaff import data


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "name"), [(0.0, "autoencoder"), (0.3, "denoising")])
def test_autoencoder_sweeps_its_code_and_draws_every_n_epochs(
    example, tmp_path: Path, capsys, noise: float, name: str
) -> None:
    module = example("autoencoder")
    options = {"latents": (2, 6), "num_epochs": 4, "validate_every": 2, "noise": noise}
    errors = module.main(module.Options(root=str(tmp_path), **options))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["latent", "2", "6"]
    assert lines[-1].split()[1:] == [f"{error:.5f}" for error in errors[6]]

    for version, latent in (("0001", 2), ("0002", 6)):
        run = tmp_path / name / version
        pictures = sorted(path.name for path in (run / "images").iterdir())
        assert pictures == ["reconstructions_156.png", "reconstructions_78.png"]
        config = json.loads((run / "config.json").read_text())
        assert (config["model"]["latent"], config["options"]["noise"]) == (latent, noise)
        tested = json.loads((run / "metrics" / "test.json").read_text())
        assert errors[latent][1] == tested["test/loss"]
    assert [path.parent.name for path in tmp_path.rglob("errors.png")] == ["0002"]


def test_autoencoder_is_compared_with_the_best_linear_map(example) -> None:
    module = example("autoencoder")
    train, _, test = (loader.arrays["image"].reshape(-1, 64) for loader in data.digits())
    pca = PCA(8).fit(train)
    rebuilt = pca.inverse_transform(pca.transform(test))
    clean = module.pca_error(train, test, 8, 0.0)
    np.testing.assert_allclose(clean, np.square(rebuilt - test).mean(), rtol=1e-6)

    seen = test + 0.3 * np.random.default_rng(0).normal(size=test.shape)
    unshrunk = np.square(pca.inverse_transform(pca.transform(seen)) - test).mean()
    assert clean < module.pca_error(train, test, 8, 0.3) < unshrunk
    # With every component kept it is the best linear map, which least squares finds too.
    noise = np.random.default_rng(1).normal(size=(30, *train.shape))
    design = np.pad((train + 0.3 * noise).reshape(-1, 64), [(0, 0), (0, 1)], constant_values=1)
    normal = design.T @ design, design.T @ np.tile(train, (30, 1))
    best = np.pad(seen, [(0, 0), (0, 1)], constant_values=1) @ np.linalg.solve(*normal)
    least = np.square(best - test).mean()
    np.testing.assert_allclose(module.pca_error(train, test, 61, 0.3), least, rtol=0.02)


def test_autoencoder_draws_what_the_model_sees(example, tmp_path: Path, monkeypatch) -> None:
    module = example("autoencoder")
    drawn = []

    class Logger:
        def log_image(self, name, image, *, step):
            drawn.append(np.asarray(image))

    batch = {"image": np.zeros((12, 8, 8, 1), np.float32)}
    trainer = module.Drawing(
        module.zoo.MLPAutoencoder((8, 8, 1), 2),
        example_batch=batch,
        noise=0.5,
        root=None,
        enable_progress_bar=False,
    )
    monkeypatch.setattr(module.Drawing, "last_run", SimpleNamespace(logger=Logger()))
    trainer.on_validation_epoch_end(1, {}, data.as_loader([batch]))
    (sheet,) = drawn
    assert sheet.shape == (3 * 10 * 8, 10 * 10 * 8)
    clean, seen, returned = jnp.split(sheet, 3)
    assert clean.max() == 0
    assert 0.1 < float((seen > 0).mean()) < 0.5
    assert float(returned[12, 12]) == pytest.approx(0.5, abs=0.45)

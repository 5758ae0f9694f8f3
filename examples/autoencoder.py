"""Autoencoders of handwritten digits, one for each length of code, beside PCA of equal size.

    .venv/bin/python examples/autoencoder.py                # reconstruct
    .venv/bin/python examples/autoencoder.py --noise 0.3    # denoise

Each is a run in `runs/autoencoder` (`runs/denoising`), which draws at every validation some digits,
what the model sees of them, and what it returns. The last one has all the errors in `errors.png`.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

import distaff
from distaff import data, tasks, zoo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What can be set from the command line."""

    latents: tuple[int, ...] = (2, 4, 8, 16, 32)
    noise: float = 0.0
    num_epochs: int = 100
    validate_every: int = 10
    root: str = "runs"


class Drawing(tasks.Autoencoder):
    def on_validation_epoch_end(self, epoch, metrics, val_loader):
        images = data.first_batch(val_loader)["image"][:10]
        seen = self.corrupt(images, jax.random.key(0))
        rows = np.stack([images, np.clip(seen, 0, 1), self.bind_model()(seen)])[..., 0]
        rows = np.pad(rows, [(0, 0), (0, 0), (1, 1), (1, 1)])
        sheet = np.kron(np.vstack([np.hstack(row) for row in rows]), np.ones((8, 8)))  # enlarged
        self.last_run.logger.log_image("reconstructions", sheet, step=self.step)


def pca_error(train: np.ndarray, test: np.ndarray, latent: int, noise: float) -> float:
    """Returns the error of PCA, each component shrunk by its share of noise (Wiener's filter)."""
    pca, clean = PCA(latent).fit(train.reshape(len(train), -1)), test.reshape(len(test), -1)
    seen = clean + noise * np.random.default_rng(0).normal(size=clean.shape)
    shrinkage = pca.explained_variance_ / (pca.explained_variance_ + noise**2)
    return np.square(pca.inverse_transform(shrinkage * pca.transform(seen)) - clean).mean()


def main(options: Options) -> dict[int, tuple[float, float, float]]:
    train, val, test = data.digits(batch_size=32)
    adam = distaff.OptimizerConfig("adam", learning_rate=3e-3, warmup_steps=50)
    run = {"name": "denoising" if options.noise else "autoencoder", "root": options.root}
    run |= {"noise": options.noise, "check_val_every_n_epoch": options.validate_every}
    errors = {}
    for latent in options.latents:
        model = zoo.MLPAutoencoder((8, 8, 1), latent, hidden=(256,))
        trainer = Drawing(model, optimizer=adam, **run)
        result = trainer.train_model(train, val, test, num_epochs=options.num_epochs)
        if result.status == "interrupted":
            raise SystemExit(130)  # as Ctrl-C ends a program; run it again to resume
        pca = pca_error(train.arrays["image"], test.arrays["image"], latent, options.noise)
        errors[latent] = (result.metrics["val/loss"], result.metrics["test/loss"], pca)
    print("latent  val MSE  test MSE  PCA's test MSE")
    for latent, row in errors.items():
        print(f"{latent:6}  {row[0]:.5f}  {row[1]:.5f}   {row[2]:.5f}")
    axes = Figure(figsize=(5, 3.5), layout="constrained").subplots()
    axes.semilogy([*map(str, errors)], [row[1:] for row in errors.values()], "o-")
    axes.set(xlabel="numbers in the code", ylabel="mean squared error, test")
    axes.legend(["autoencoder", "PCA"])
    axes.figure.savefig(result.path / "errors.png")
    return errors


if __name__ == "__main__":
    main(tyro.cli(Options))

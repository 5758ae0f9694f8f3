"""An autoencoder of handwritten digits, whose reconstructions are drawn every few epochs.

    .venv/bin/python examples/autoencoder.py --num-epochs 30

The pictures are `runs/autoencoder/<version>/images/reconstructions_<step>.png`: the upper row holds
validation digits, the lower one what `--latent` numbers keep of each.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro

import distaff
from distaff import data


class Autoencoder(nn.Module):
    """Two linear layers in, two out, and `latent` numbers between."""

    latent: int
    width: int = 128

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        flat = image.reshape(image.shape[0], -1)
        code = nn.Dense(self.latent)(nn.relu(nn.Dense(self.width)(flat)))
        decoded = nn.Dense(flat.shape[1])(nn.relu(nn.Dense(self.width)(code)))
        return nn.sigmoid(decoded).reshape(image.shape)


class Reconstructing(distaff.TrainerModule):
    """Draws ten digits and their reconstructions every `draw_every` epochs."""

    draw_every: int = 10

    def loss_fn(self, params, batch, ctx):
        error = ctx.apply(params, batch["image"]) - batch["image"]
        return jnp.square(error).mean(axis=(1, 2, 3))

    def on_validation_epoch_end(self, epoch, metrics, val_loader):
        metrics["val/psnr"] = -10 * np.log10(metrics["val/loss"])
        if epoch % self.draw_every == 0:
            images = data.first_batch(val_loader)["image"][:10]
            rebuilt = np.asarray(self.bind_model()(images))
            framed = [np.pad(row[..., 0], ((0, 0), (1, 1), (1, 1))) for row in (images, rebuilt)]
            sheet = np.vstack([np.hstack(row) for row in framed])
            sheet = np.kron(sheet, np.ones((8, 8)))  # eight screen pixels for one
            self.recording.logger.log_image("reconstructions", sheet, step=self.step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What can be set from the command line."""

    num_epochs: int = 30
    latent: int = 8
    draw_every: int = 10
    root: str = "runs"


def main(options: Options) -> distaff.TrainResult:
    train, val, test = data.digits(batch_size=32)
    trainer = Reconstructing(
        Autoencoder(options.latent),
        optimizer=distaff.OptimizerConfig("adam", learning_rate=3e-3),
        name="autoencoder",
        root=options.root,
    )
    trainer.draw_every = options.draw_every
    return trainer.train_model(train, val, test, num_epochs=options.num_epochs)


if __name__ == "__main__":
    main(tyro.cli(Options))

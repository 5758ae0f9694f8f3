"""An autoencoder of linear layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import jax

from distaff.zoo.mlp import MLP


class MLPAutoencoder(nn.Module):
    """Two multilayer perceptrons: `encoder`, and `decoder` with its layers in reverse.

    Attributes:
        shape: of one example, without the batch axis.
        latent: numbers that are kept of each example.
        hidden: outputs of the encoder's layers between.
    """

    shape: Sequence[int]
    latent: int
    hidden: Sequence[int] = (128,)

    def setup(self) -> None:
        """Makes the two networks."""
        self.encoder = MLP((*self.hidden, self.latent))
        self.decoder = MLP((*reversed(self.hidden), math.prod(self.shape)))

    def encode(self, x: jax.Array) -> jax.Array:
        """Returns what is kept of `x` `[batch, *shape]`: codes `[batch, latent]`, unbounded."""
        return self.encoder(x)

    def decode(self, code: jax.Array) -> jax.Array:
        """Returns examples for codes `[batch, latent]`: `[batch, *shape]`, in (0, 1)."""
        return nn.sigmoid(self.decoder(code)).reshape(-1, *self.shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Reconstructs.

        Args:
            x: inputs `[batch, *shape]`, float.

        Returns:
            Reconstructions `[batch, *shape]`, in (0, 1).
        """
        return self.decode(self.encode(x))

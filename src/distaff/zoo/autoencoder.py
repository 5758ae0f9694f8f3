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
        shape: shape of one example, without the batch axis.
        latent: size of the code of an example.
        hidden: outputs of each hidden layer of the encoder.
    """

    shape: Sequence[int]
    latent: int
    hidden: Sequence[int] = (128,)

    def setup(self) -> None:
        """Creates the two networks."""
        self.encoder = MLP((*self.hidden, self.latent))
        self.decoder = MLP((*reversed(self.hidden), math.prod(self.shape)))

    def encode(self, x: jax.Array) -> jax.Array:
        """Returns the codes `[batch, latent]` of `x` `[batch, *shape]`, unbounded."""
        return self.encoder(x)

    def decode(self, code: jax.Array) -> jax.Array:
        """Returns examples `[batch, *shape]` in (0, 1) for codes `[batch, latent]`."""
        return nn.sigmoid(self.decoder(code)).reshape(-1, *self.shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns reconstructions `[batch, *shape]` in (0, 1) of `x`, float `[batch, *shape]`."""
        return self.decode(self.encode(x))

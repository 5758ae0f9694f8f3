"""A multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax

from distaff.errors import ConfigError


class MLP(nn.Module):
    """Linear layers with a ReLU between each and the next.

    Attributes:
        features: outputs of each layer; the last is the length of the network's output.
    """

    features: Sequence[int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Computes the last layer's outputs.

        Args:
            x: inputs, `[batch, ...]`, float; all axes but the first are flattened.

        Returns:
            Outputs before any activation, `[batch, features[-1]]`.

        Raises:
            ConfigError: there are no features.
        """
        if not self.features:
            raise ConfigError("MLP(features=...) has at least one layer; got ().")
        *hidden, outputs = self.features
        x = x.reshape(x.shape[0], -1)
        for features in hidden:
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(outputs)(x)

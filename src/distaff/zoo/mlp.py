"""A multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax

from distaff.core.config.checks import is_zero
from distaff.core.config.options import traced
from distaff.errors import ConfigError


class MLP(nn.Module):
    """Linear layers, separated by batch normalization, ReLU and dropout.

    Batch normalization keeps running means and variances in the collection `batch_stats`; dropout
    needs a key for the stream `dropout` in training. Both are off by default.

    Attributes:
        features: outputs of each layer; the last is the size of the network's output.
        dropout: dropout rate between layers, in `[0, 1]`.
        batch_norm: whether to normalize each layer but the last.
    """

    features: Sequence[int]
    dropout: float = traced(0.0)
    batch_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Computes the last layer's outputs.

        Args:
            x: inputs, `[batch, ...]`, float; all axes but the first are flattened.
            train: use batch statistics and dropout, rather than running statistics.

        Returns:
            Outputs before any activation, `[batch, features[-1]]`.

        Raises:
            ConfigError: there are no features.
        """
        if not self.features:
            raise ConfigError("MLP(features=...) needs at least one layer; got ().")
        *hidden, outputs = self.features
        x = x.reshape(x.shape[0], -1)
        for features in hidden:
            x = nn.Dense(features)(x)
            if self.batch_norm:
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.relu(x)
            if not is_zero(self.dropout):
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(outputs)(x)

"""A convolutional network for small images."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax

from distaff.core.config.options import traced
from distaff.errors import BatchError, ConfigError


class CNN(nn.Module):
    """Blocks of convolution, batch normalization, ReLU and pooling, then one linear layer.

    The first block keeps height and width; each later one halves them, rounded up. Batch
    normalization keeps running means and variances in the collection `batch_stats`; training needs
    a key for the stream `dropout`. For `[batch, 8, 8, 1]` the default has 30,762 parameters.

    Attributes:
        num_classes: length of the last axis of the logits.
        features: channels of each block.
        dropout: fraction of the last block's values set to zero in training, in `[0, 1]`.
    """

    num_classes: int = 10
    features: Sequence[int] = (32, 32, 64)
    dropout: float = traced(0.5)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Computes the logits.

        Args:
            x: images, `[batch, height, width, channels]`, float.
            train: use batch statistics and dropout, rather than running statistics.

        Returns:
            Logits, `[batch, num_classes]`.

        Raises:
            BatchError: `x` has another number of axes.
            ConfigError: there are no features.
        """
        if x.ndim != 4:
            raise BatchError(
                f"CNN needs images [batch, height, width, channels]; got {x.shape}. "
                "Grayscale images need a last axis of length 1: x[..., None]."
            )
        if not self.features:
            raise ConfigError("CNN(features=...) needs at least one block; got ().")
        for block, features in enumerate(self.features):
            x = nn.Conv(features, kernel_size=(3, 3), use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.relu(x)
            if block > 0:
                x = nn.max_pool(x, window_shape=(2, 2), strides=(2, 2), padding="SAME")
        x = x.reshape(x.shape[0], -1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes)(x)

"""A convolutional network for small pictures."""

from __future__ import annotations

import flax.linen as nn
import jax


class CNN(nn.Module):
    """Blocks of convolution, batch normalization, ReLU and pooling, then one linear layer.

    Each block halves height and width, rounded down; a side of one stays one. Batch normalization
    keeps running means and variances in the collection `batch_stats`; training needs a key for the
    stream `dropout`. With the defaults and `[batch, 8, 8, 1]` it has 21 738 parameters.

    Attributes:
        num_classes: length of the last axis of the logits.
        features: channels of each block.
        dropout: fraction of the last block's values set to zero in training, in `[0, 1)`.
    """

    num_classes: int = 10
    features: tuple[int, ...] = (32, 64)
    dropout: float = 0.3

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Computes the logits.

        Args:
            x: pictures, `[batch, height, width, channels]`, float.
            train: use the batch's own statistics and dropout, rather than the running statistics.

        Returns:
            Logits, `[batch, num_classes]`, of the dtype of `x`.
        """
        for features in self.features:
            x = nn.Conv(features, kernel_size=(3, 3), use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.relu(x)
            x = nn.max_pool(x, window_shape=(2, 2), strides=(2, 2), padding="SAME")
        x = x.reshape(x.shape[0], -1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes)(x)

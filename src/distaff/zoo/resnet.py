"""A residual network for small images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from distaff.errors import BatchError, ConfigError


class ResNet(nn.Module):
    """The residual network that K. He et al. trained on CIFAR-10 (2016, arXiv:1512.03385, 4.2).

    A convolution without pooling, stages of residual blocks, the mean over all pixels, and one
    linear layer. The first stage keeps height and width; each later one halves them, rounded up.
    Shortcuts have no parameters: at the beginning of a stage they take every other pixel, and pad
    new channels with zeros (option A). Kernels are initialised as by He et al. (2015,
    arXiv:1502.01852). Batch normalization keeps running means and variances in the collection
    `batch_stats`.

    With `blocks=(n, n, n)` it has `6n + 2` layers: the default is ResNet-8, with 75,290 parameters
    for color images; `blocks=(3, 3, 3)` is ResNet-20, with 269,722.

    Attributes:
        num_classes: length of the last axis of the logits.
        blocks: residual blocks of each stage.
        features: channels of each stage, in non-decreasing order.
    """

    num_classes: int = 10
    blocks: Sequence[int] = (1, 1, 1)
    features: Sequence[int] = (16, 32, 64)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Computes the logits.

        Args:
            x: images, `[batch, height, width, channels]`, float.
            train: normalize by batch statistics, rather than running statistics.

        Returns:
            Logits, `[batch, num_classes]`.

        Raises:
            BatchError: `x` has another number of axes.
            ConfigError: blocks and features do not describe the same stages.
        """
        if x.ndim != 4:
            raise BatchError(
                f"ResNet needs images [batch, height, width, channels]; got {x.shape}. "
                "Grayscale images need a last axis of length 1: x[..., None]."
            )
        _check_stages(tuple(self.blocks), tuple(self.features))
        x = _convolution(self.features[0])(x)
        x = nn.relu(_normalization(train)(x))
        for stage, (blocks, features) in enumerate(zip(self.blocks, self.features, strict=True)):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = ResidualBlock(features, stride)(x, train)
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))


class ResidualBlock(nn.Module):
    """Two convolutions, each with batch normalization, and a shortcut around both.

    Attributes:
        features: output channels, at least as many as input channels.
        stride: stride in height and width.
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Returns `[batch, height / stride, width / stride, features]`, rounded up."""
        residual = _convolution(self.features, strides=self.stride)(x)
        residual = nn.relu(_normalization(train)(residual))
        residual = _normalization(train)(_convolution(self.features)(residual))
        shortcut = x[:, :: self.stride, :: self.stride]
        new_channels = self.features - x.shape[-1]
        shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, new_channels)))
        return nn.relu(shortcut + residual)


# Padded on both sides, so that a stride of two samples the same pixels as the shortcut.
_convolution = partial(
    nn.Conv,
    kernel_size=(3, 3),
    padding=1,
    use_bias=False,
    kernel_init=nn.initializers.he_normal(),
)


def _normalization(train: bool) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, momentum=0.9)


def _check_stages(blocks: tuple[int, ...], features: tuple[int, ...]) -> None:
    if not features or len(blocks) != len(features) or min(blocks) < 1:
        raise ConfigError(
            "ResNet needs at least one stage, and at least one block in each; got "
            f"blocks={blocks}, features={features}. Give both one entry for each stage."
        )
    if list(features) != sorted(features):
        raise ConfigError(
            "The features of a ResNet must not decrease from stage to stage, since its shortcuts "
            f"only add channels; got features={features}."
        )

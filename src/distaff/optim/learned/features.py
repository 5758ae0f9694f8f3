"""The input features of VeLO's networks, from tensors, gradients and the loss.

Everything is float32. Running averages with several decays have them on the leading axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_DECAYS = np.array([0.9, 0.99, 0.999], np.float32)
_RMS_DECAY = np.float32(0.999)
_MILESTONES = np.array([0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1], np.float32)
_NUM_RANKS = 5
_NUM_AVERAGES = 10
_UNSEEN = np.float32(999999999999.0)


class Moments(NamedTuple):
    """Running averages over the gradients of one tensor.

    Attributes:
        momentum: average gradient, `[3, *shape]`.
        square: average squared gradient, `shape`.
        factors: average squared gradient, averaged over the longest axis and over the second
            longest: two arrays `[3, ...]`; one array `[3, *shape]` for a tensor of fewer than two
            axes.
    """

    momentum: jax.Array
    square: jax.Array
    factors: tuple[jax.Array, ...]


class LossAverages(NamedTuple):
    """Running averages of the loss over 10 horizons.

    Attributes:
        means: averages without bias correction, `[10]`.
        lowest: lowest value of each corrected average so far, `[10]`.
        count: number of losses, int32 `[]`.
    """

    means: jax.Array
    lowest: jax.Array
    count: jax.Array


def init_moments(shape: Sequence[int]) -> Moments:
    """Returns the averages of a tensor before its first gradient."""
    axes = _factored_axes(shape)
    kept = [np.delete(shape, axis) for axis in axes] if axes else [shape]
    return Moments(
        jnp.zeros([3, *shape], jnp.float32),
        jnp.zeros(shape, jnp.float32),
        tuple(jnp.zeros([3, *map(int, lengths)], jnp.float32) for lengths in kept),
    )


def update_moments(moments: Moments, grad: jax.Array) -> Moments:
    """Returns the averages updated with a gradient of `shape`."""
    squares = jnp.square(grad) + 1e-30
    axes = _factored_axes(grad.shape)
    factors = [squares.mean(axis) for axis in axes] if axes else [squares]
    return Moments(
        _update_average(moments.momentum, grad),
        _RMS_DECAY * moments.square + (1 - _RMS_DECAY) * jnp.square(grad),
        tuple(map(_update_average, moments.factors, factors)),
    )


def _update_average(mean: jax.Array, value: jax.Array) -> jax.Array:
    decays: Any = _DECAYS.reshape(3, *[1] * value.ndim)
    return decays * mean + (1 - decays) * value[None]


def _factored_axes(shape: Sequence[int]) -> tuple[int, int] | None:
    """Returns the longest axis and the second longest; None for fewer than two axes."""
    if len(shape) < 2:
        return None
    # A stable sort makes the order of equal axes the same on every machine.
    by_length = np.argsort(shape, kind="stable")
    return int(by_length[-1]), int(by_length[-2])


def tensor_features(
    param: jax.Array, moments: Moments, fraction_trained: jax.Array, loss_features: jax.Array
) -> jax.Array:
    """Returns the LSTM's features of a tensor: float32 `[30]`.

    Args:
        param: the tensor.
        moments: its averages before the gradient of this step.
        fraction_trained: completed steps divided by all steps, `[]`.
        loss_features: features of the loss from `update_loss_averages`, `[9]`.
    """
    scale = jax.lax.rsqrt(jnp.maximum(1e-9, jnp.square(param).mean()))
    axes = tuple(range(1, param.ndim + 1))
    momentum, square = moments.momentum * scale, moments.square[None] * scale
    mean = momentum.mean(axes, keepdims=True)
    # Around the mean of the momentum, as the published networks were trained.
    square_spread = jnp.square(square - mean).mean(axes)
    rank = sum(length > 1 for length in param.shape)
    return jnp.concatenate(
        [
            jnp.tanh((fraction_trained - _MILESTONES) * 10),
            loss_features,
            _log_size(square.mean(axes)),
            jax.nn.one_hot(rank, _NUM_RANKS, dtype=jnp.float32),
            _log_size(jnp.square(momentum - mean).mean(axes)),
            _log_size(square_spread),
        ]
    )


def _log_size(value: jax.Array) -> jax.Array:
    return 0.5 * jnp.clip(jnp.log(1e-8 + jnp.abs(10 * value)), -5, 5)


def parameter_features(
    param: jax.Array, grad: jax.Array, moments: Moments
) -> tuple[jax.Array, ...]:
    """Returns the MLP's features of each parameter of a tensor, 30 numbers of 14 kinds.

    Args:
        param: the tensor.
        grad: its gradient.
        moments: its averages, including this gradient.

    Returns:
        One array per kind, float32 `[1, ...]` or `[3, ...]`. The other axes are the
        tensor's, with length 1 along axes that the feature does not depend on.
    """
    momentum, square = moments.momentum, moments.square[None]
    inverse_rms = jax.lax.rsqrt(square + 1e-6)
    rows, columns, grad_scale, momentum_scale = _factor_features(moments)
    return (
        grad[None],
        jnp.clip(grad, -0.1, 0.1)[None],
        param[None],
        momentum,
        square,
        momentum * inverse_rms,
        inverse_rms,
        grad[None] * grad_scale,
        grad[None] * inverse_rms,
        rows,
        columns,
        jax.lax.rsqrt(rows + 1e-8),
        jax.lax.rsqrt(columns + 1e-8),
        momentum * momentum_scale,
    )


def _factor_features(moments: Moments) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns averaged squares along both axes, and the scales of gradient and momentum."""
    axes = _factored_axes(moments.square.shape)
    if axes is None:
        (full,) = moments.factors
        return full, full, _safe_rsqrt(full + 1e-9), jax.lax.rsqrt(full)
    longest, second = axes
    row, column = moments.factors
    rows = jnp.expand_dims(row, longest + 1)
    columns = jnp.expand_dims(column, second + 1)
    relative = rows / (rows.mean(second + 1, keepdims=True) + 1e-9)
    scale = _safe_rsqrt(relative) * _safe_rsqrt(columns)
    return rows, columns, scale, scale


def _safe_rsqrt(value: jax.Array) -> jax.Array:
    return jax.lax.rsqrt(jnp.maximum(value, 1e-9))


def init_loss_averages() -> LossAverages:
    """Returns the averages before the first loss."""
    return LossAverages(
        jnp.zeros(_NUM_AVERAGES, jnp.float32),
        jnp.full(_NUM_AVERAGES, _UNSEEN),
        jnp.zeros([], jnp.int32),
    )


def update_loss_averages(
    averages: LossAverages, loss: jax.Array, horizon: int
) -> tuple[LossAverages, jax.Array]:
    """Returns the averages updated with a loss, and the LSTM's features of them.

    Args:
        averages: the averages before it.
        loss: float32 `[]`; clipped to twice the highest average.
        horizon: steps of the longest average; the shortest spans 10.

    Returns:
        The averages; and float32 `[9]`, the position of each between its lowest value, -1, and the
        next longer average, 0. It is at most 1, and zero in the first two steps.
    """
    halflives = np.logspace(1, np.log10(horizon), _NUM_AVERAGES)
    decays = np.exp(-1 / halflives).astype(np.float32)
    count = averages.count.astype(jnp.float32)
    highest = jnp.where(count == 0, loss, (averages.means / (1 - decays ** (count + 1))).max())
    loss = jnp.minimum(jnp.abs(highest) * 2, loss)
    means = averages.means * decays + loss * (1 - decays)
    corrected = means / (1 - decays ** (count + 1))
    lowest = jnp.minimum(averages.lowest, corrected)
    # Exactly zero for an average that is at its lowest. The two terms of `corrected - lowest` might
    # be compiled differently and differ in the last bit; with equal decays, as in the bugged
    # features, the quotient could then have any size.
    above = jnp.maximum(corrected - averages.lowest, 0)
    spread = jnp.maximum(1e-8, corrected[1:] - lowest[:-1])
    position = jnp.clip(above[:-1] / spread - 1, -1, 1)
    features = jnp.where(averages.count < 2, 0, position)
    return LossAverages(means, lowest, averages.count + 1), features

"""Softmax cross-entropy, with label smoothing or focal, and the checks of these options."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distaff.core.config.checks import as_float, is_zero
from distaff.errors import ConfigError, LossError


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, smoothing: float = 0.0, focal: float = 0.0
) -> jax.Array:
    """Returns the cross-entropy `[...]`, in nats.

    Args:
        logits: float32 `[..., classes]`.
        labels: class indices, int32 `[...]`, or probabilities, float32 `[..., classes]`.
        smoothing: probability that is spread evenly over all classes.
        focal: focusing parameter of the focal loss; 0 for none. Needs class indices.

    Raises:
        LossError: `focal` with probabilities.
    """
    are_soft = labels.ndim == logits.ndim
    if not is_zero(focal):
        if are_soft:
            raise LossError(
                "The focal loss needs one class per example, int [batch]; the labels are "
                f"probabilities {labels.shape}. Pass class indices, or focal=0."
            )
        return _focal(logits, labels, focal)
    if are_soft:
        loss = optax.softmax_cross_entropy(logits, labels)
    else:
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return loss if is_zero(smoothing) else smoothed(loss, logits, smoothing)


def smoothed(loss: jax.Array, logits: jax.Array, smoothing: float) -> jax.Array:
    """Returns the cross-entropy with smoothed labels, given the one without.

    Smoothed labels are `(1 - smoothing) * labels + smoothing / classes` (C. Szegedy et al.,
    Rethinking the Inception Architecture for Computer Vision, CVPR 2016). This form needs no labels
    `[..., classes]`.
    """
    uniform = jax.nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)
    return (1 - smoothing) * loss + smoothing * uniform


def _focal(logits: jax.Array, labels: jax.Array, gamma: float) -> jax.Array:
    """Returns `-(1 - p)**gamma * log(p)`, `p` being the probability of the label's class."""
    log_odds = jax.nn.log_softmax(logits, axis=-1)
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    log_p = jnp.sum(jnp.where(is_label, log_odds, 0), axis=-1)
    # With the logarithm of 1 - p, the gradient is finite where p rounds to 1, for any gamma.
    log_rest = jax.nn.logsumexp(jnp.where(is_label, -jnp.inf, log_odds), axis=-1)
    return -jnp.exp(gamma * log_rest) * log_p


def fraction(name: str, value: Any) -> float:
    """Checks that an option is a number of at least 0 and less than 1."""
    number = as_float(value)
    if not 0 <= number < 1:
        raise ConfigError(f"{name} must be at least 0 and less than 1; got {value!r}.")
    return number


def focusing(name: str, value: Any) -> float:
    """Checks that an option is a finite number of at least 0."""
    number = as_float(value)
    if not 0 <= number < math.inf:
        raise ConfigError(
            f"{name}, the focusing parameter of the focal loss, must be a finite number, at least "
            f"0; got {value!r}. Pass 2, or 0 for no focal loss."
        )
    return number


def check_together(smoothing: float, focal: float) -> None:
    """Checks that the focal loss is not combined with label smoothing.

    Raises:
        ConfigError: it is.
    """
    if smoothing and focal:
        raise ConfigError(
            f"focal={focal} and label_smoothing={smoothing} contradict each other: one makes the "
            "loss of confident predictions smaller, the other larger. Pass one of them."
        )

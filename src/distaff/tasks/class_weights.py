"""Class weights: one weight per class, which the examples of the class have in the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.config.checks import as_float, whole
from distaff.errors import ConfigError, LossError


def balanced_weights(labels: Any, num_classes: int | None = None) -> tuple[float, ...]:
    """Returns class weights that give every class the same total weight.

    The weight of a class is `examples / (classes * examples of the class)`, as in scikit-learn's
    `compute_class_weight("balanced")`.

    >>> balanced_weights([0, 0, 0, 1])
    (0.6666666666666666, 2.0)

    Args:
        labels: class indices of the training set, int `[examples]`.
        num_classes: number of classes; the largest label plus 1 by default.

    Raises:
        ConfigError: labels are not class indices, or a class has no examples.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not labels.size or labels.dtype.kind not in "iub":
        raise ConfigError(
            "balanced_weights takes the class indices of a training set, int [examples]; got "
            f"dtype {labels.dtype} and shape {labels.shape}. Of one-hot labels, pass "
            "labels.argmax(-1)."
        )
    if num_classes is not None:
        whole("num_classes", num_classes)
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or (num_classes is not None and most >= num_classes):
        raise ConfigError(
            f"Class indices must be from 0 to {(num_classes or most + 1) - 1}; the labels range "
            f"from {least} to {most}. Leave ignored labels out: labels[labels >= 0]."
        )
    counts = np.bincount(labels, minlength=num_classes or 0)
    if not counts.all():
        raise ConfigError(
            f"The classes {np.flatnonzero(counts == 0)[:5].tolist()} have no examples, so no "
            "weight balances them. Pass class_weights with a weight of your choice for them."
        )
    return tuple((labels.size / (len(counts) * counts)).tolist())


def class_weights(name: str, value: Any) -> tuple[float, ...]:
    """Checks that an option is a list of finite weights, at least 0, not all 0."""
    if isinstance(value, str):
        raise ConfigError(
            f"{name} must be a list of one weight per class; got {value!r}. To balance classes, "
            f"pass {name}=tasks.balanced_weights(labels), with the labels of the training set."
        )
    if isinstance(value, Mapping):
        raise ConfigError(
            f"{name} must be a list of one weight per class, in the order of the classes; got "
            f"{value!r}. Pass [weights[c] for c in range(num_classes)]."
        )
    try:
        weights = tuple(as_float(each) for each in np.asarray(value).tolist())
    except (TypeError, ValueError):
        weights = ()
    if not weights or not all(0 <= each < math.inf for each in weights) or not any(weights):
        raise ConfigError(
            f"{name} must be a list of one finite number per class, at least 0 and not all 0; got "
            f"{value!r}."
        )
    return weights


def weighed(
    name: str, weights: tuple[float, ...], labels: jax.Array, num_classes: int
) -> jax.Array:
    """Returns the class weight of each label.

    Args:
        name: name of the option, for the error.
        weights: one weight per class.
        labels: class indices, int `[batch]`, or probabilities, float `[batch, classes]`, whose
            weight is the mean of the class weights under them.
        num_classes: number of classes of the model.

    Raises:
        LossError: the number of weights is not the number of classes.
    """
    check_number(name, weights, num_classes)
    table = jnp.asarray(weights, jnp.float32)
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return jnp.sum(labels * table.astype(labels.dtype)[None], axis=-1)
    return table[labels]


def check_number(name: str, weights: Sequence[float], num_classes: int) -> None:
    """Checks that there is one weight per class of the model.

    Raises:
        LossError: there is not.
    """
    if len(weights) != num_classes:
        raise LossError(
            f"{name} has {len(weights)} weights, but the model returns {num_classes} logits. Pass "
            "one weight per class."
        )

"""Optimizers for models that compute in another precision."""

from __future__ import annotations

import optax

from distaff.models import PrecisionConfig, precision_of
from distaff.models.precision.options import PrecisionName
from distaff.optim.transforms.loss_scale import with_loss_scale


def for_precision(
    tx: optax.GradientTransformation, precision: PrecisionName | PrecisionConfig
) -> optax.GradientTransformation:
    """Wraps an optimizer as the precision of its model needs it; float32 and bfloat16 do not.

    Args:
        tx: any Optax optimizer.
        precision: a name, or a `PrecisionConfig`.
    """
    found = precision_of(precision)
    return with_loss_scale(tx, initial=found.loss_scale) if found.is_scaled else tx

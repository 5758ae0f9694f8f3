"""Optimizers for models that compute in another precision."""

from __future__ import annotations

import optax

from distaff.models import PrecisionConfig, precision_of
from distaff.models.precision.options import PrecisionName
from distaff.optim.transforms.loss_scale import with_loss_scale
from distaff.optim.transforms.master_copy import with_master_copy
from distaff.optim.transforms.moments import with_half_moments


def for_precision(
    tx: optax.GradientTransformation, precision: PrecisionName | PrecisionConfig
) -> optax.GradientTransformation:
    """Wraps an optimizer as the precision of its model needs it; most need nothing.

    Args:
        tx: any Optax optimizer.
        precision: a name, or a `PrecisionConfig`.
    """
    found = precision_of(precision)
    if found.moments == "bfloat16":
        tx = with_half_moments(tx)
    if found.params is not None:
        tx = with_master_copy(tx)
    return with_loss_scale(tx, initial=found.loss_scale) if found.is_scaled else tx

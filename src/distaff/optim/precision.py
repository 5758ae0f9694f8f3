"""Optimizers for models that compute in another precision."""

from __future__ import annotations

import optax

from distaff.core.typing import PyTree
from distaff.errors import ConfigError
from distaff.models import PrecisionConfig, precision_of
from distaff.models.precision.options import PrecisionName
from distaff.optim.transforms.extra_args import contains
from distaff.optim.transforms.loss_scale import with_loss_scale
from distaff.optim.transforms.master_copy import MasterCopyState, with_master_copy
from distaff.optim.transforms.moments import with_half_moments


def check_copy(opt_state: PyTree, precision: PrecisionName | PrecisionConfig) -> None:
    """Checks that an optimizer of your own keeps a float32 copy of parameters in half precision.

    Raises:
        ConfigError: it does not, so that small updates would be lost.
    """
    found = precision_of(precision)
    if found.params is not None and not contains(opt_state, MasterCopyState):
        raise ConfigError(
            f"precision={found.name!r} needs an optimizer with a float32 copy of the parameters: "
            "without one, small updates are lost. In an init_optimizer of your own, wrap it: "
            "optim.with_master_copy(tx)."
        )


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

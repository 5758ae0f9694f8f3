"""Optimizers: a config becomes an Optax transformation, with its schedule and weight-decay mask."""

from distaff.optim.build import Optimizer, OptimizerLike, build_optimizer
from distaff.optim.config import OptimizerConfig
from distaff.optim.masks import decay_mask
from distaff.optim.schedules import make_schedule

__all__ = [
    "Optimizer",
    "OptimizerConfig",
    "OptimizerLike",
    "build_optimizer",
    "decay_mask",
    "make_schedule",
]

"""Optimizers: a config becomes an Optax transformation, with its schedule and weight-decay mask."""

from distaff.optim.build import Optimizer, OptimizerLike, build_optimizer
from distaff.optim.config import OptimizerConfig, ParamGroup
from distaff.optim.masks import decay_mask
from distaff.optim.penalty import decays, l2_loss
from distaff.optim.schedules import make_schedule

__all__ = [
    "Optimizer",
    "OptimizerConfig",
    "OptimizerLike",
    "ParamGroup",
    "build_optimizer",
    "decay_mask",
    "decays",
    "l2_loss",
    "make_schedule",
]

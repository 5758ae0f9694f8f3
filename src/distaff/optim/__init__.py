"""Builds Optax transformations, with schedules and weight-decay masks, from configs."""

from distaff.optim.build import Optimizer, OptimizerLike, build_optimizer
from distaff.optim.config import OptimizerConfig, ParamGroup
from distaff.optim.evaluation import evaluation_params, has_evaluation_params
from distaff.optim.rates import applied_rates, make_rates
from distaff.optim.schedules import make_schedule
from distaff.optim.transforms.accumulate import AccumulateState, accumulate, num_updates
from distaff.optim.transforms.extra_args import with_known_args
from distaff.optim.transforms.loss_scale import LossScaleState, loss_scale, with_loss_scale
from distaff.optim.transforms.masks import decay_mask
from distaff.optim.transforms.master_copy import MasterCopyState, with_master_copy
from distaff.optim.transforms.moments import with_half_moments
from distaff.optim.transforms.muon import muon_routes
from distaff.optim.transforms.observe import Geometry, ObservedState, geometry, observed
from distaff.optim.transforms.penalty import decays, l2_loss
from distaff.optim.transforms.plateau import Plateau
from distaff.optim.transforms.soap import SoapState, scale_by_soap, soap

__all__ = [
    "AccumulateState",
    "Geometry",
    "LossScaleState",
    "MasterCopyState",
    "ObservedState",
    "Optimizer",
    "OptimizerConfig",
    "OptimizerLike",
    "ParamGroup",
    "Plateau",
    "SoapState",
    "accumulate",
    "applied_rates",
    "build_optimizer",
    "decay_mask",
    "decays",
    "evaluation_params",
    "geometry",
    "has_evaluation_params",
    "l2_loss",
    "loss_scale",
    "make_rates",
    "make_schedule",
    "muon_routes",
    "num_updates",
    "observed",
    "scale_by_soap",
    "soap",
    "with_half_moments",
    "with_known_args",
    "with_loss_scale",
    "with_master_copy",
]

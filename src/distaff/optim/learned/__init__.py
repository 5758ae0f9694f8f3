"""Learned optimizers: networks trained to train networks."""

from distaff.optim.learned.optimizer import VeloState, velo
from distaff.optim.learned.settings import (
    RELEASED,
    VeloSettings,
    VeloWeights,
    init_weights,
    weight_shapes,
)
from distaff.optim.learned.weights import WHERE_TO_GET, read_weights

__all__ = [
    "RELEASED",
    "WHERE_TO_GET",
    "VeloSettings",
    "VeloState",
    "VeloWeights",
    "init_weights",
    "read_weights",
    "velo",
    "weight_shapes",
]

"""Loads weights by name from checkpoints, files and trees, and exports them."""

from __future__ import annotations

from distaff.checkpoint.weights.export import export_torch_weights, export_weights
from distaff.checkpoint.weights.init_from import InitFrom, as_init_from
from distaff.checkpoint.weights.loading import loaded
from distaff.checkpoint.weights.names import named
from distaff.checkpoint.weights.pytorch import TorchRules, as_rules
from distaff.checkpoint.weights.source import EVALUATION_PARAMS

__all__ = [
    "EVALUATION_PARAMS",
    "InitFrom",
    "TorchRules",
    "as_init_from",
    "as_rules",
    "export_torch_weights",
    "export_weights",
    "loaded",
    "named",
]

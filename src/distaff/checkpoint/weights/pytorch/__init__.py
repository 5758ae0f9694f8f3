"""Weights of PyTorch models: names and layouts, in both directions."""

from __future__ import annotations

from distaff.checkpoint.weights.pytorch.conversion import converted, tensors_of
from distaff.checkpoint.weights.pytorch.modules import Modules, modules_of
from distaff.checkpoint.weights.pytorch.plan import make_plan
from distaff.checkpoint.weights.pytorch.rules import TorchRules, as_rules

__all__ = [
    "Modules",
    "TorchRules",
    "as_rules",
    "converted",
    "make_plan",
    "modules_of",
    "tensors_of",
]

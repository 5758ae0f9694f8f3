"""Loads weights by name from checkpoints, files and trees, and exports them."""

from __future__ import annotations

from distaff.checkpoint.weights.export import export_weights
from distaff.checkpoint.weights.init_from import InitFrom, as_init_from
from distaff.checkpoint.weights.loading import loaded
from distaff.checkpoint.weights.names import named
from distaff.checkpoint.weights.source import EVALUATION_PARAMS

__all__ = ["EVALUATION_PARAMS", "InitFrom", "as_init_from", "export_weights", "loaded", "named"]

"""Weights by name: taken from checkpoints, files and trees, and exported."""

from __future__ import annotations

from distaff.weights.export import export_weights
from distaff.weights.init_from import InitFrom, as_init_from
from distaff.weights.loading import loaded
from distaff.weights.names import named
from distaff.weights.source import EVALUATION_PARAMS

__all__ = ["EVALUATION_PARAMS", "InitFrom", "as_init_from", "export_weights", "loaded", "named"]

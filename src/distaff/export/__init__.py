"""Exports a trained model to run without Distaff, in StableHLO."""

from distaff.export.folder import export_model

__all__ = ["export_model"]

"""Callbacks: code of your own at six points of a run."""

from __future__ import annotations

from distaff.callbacks.callback import Callback, Callbacks, StepInfo, StopTraining
from distaff.callbacks.early_stopping import EarlyStopping

__all__ = ["Callback", "Callbacks", "EarlyStopping", "StepInfo", "StopTraining"]

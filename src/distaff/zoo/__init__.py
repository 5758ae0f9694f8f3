"""Small reference models that the tasks and the examples train."""

from __future__ import annotations

from distaff.zoo.cnn import CNN
from distaff.zoo.mlp import MLP

__all__ = ["CNN", "MLP"]

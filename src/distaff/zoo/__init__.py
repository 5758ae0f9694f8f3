"""Small reference models for the tasks and examples."""

from __future__ import annotations

from distaff.zoo.autoencoder import MLPAutoencoder
from distaff.zoo.cnn import CNN
from distaff.zoo.gaussian_ring import GaussianRing
from distaff.zoo.gpt import GPT
from distaff.zoo.mlp import MLP
from distaff.zoo.resnet import ResNet
from distaff.zoo.sampling import generate
from distaff.zoo.stacking import separate_blocks, stacked_blocks

__all__ = [
    "CNN",
    "GPT",
    "MLP",
    "GaussianRing",
    "MLPAutoencoder",
    "ResNet",
    "generate",
    "separate_blocks",
    "stacked_blocks",
]

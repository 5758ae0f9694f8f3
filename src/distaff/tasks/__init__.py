"""Trainers for common tasks, which need only a model."""

from __future__ import annotations

from distaff.tasks.autoencoder import Autoencoder
from distaff.tasks.class_weights import balanced_weights
from distaff.tasks.classifier import Classifier
from distaff.tasks.language_model import LanguageModel
from distaff.tasks.multi_label import MultiLabelClassifier
from distaff.tasks.regressor import Regressor

__all__ = [
    "Autoencoder",
    "Classifier",
    "LanguageModel",
    "MultiLabelClassifier",
    "Regressor",
    "balanced_weights",
]

"""Trainers for common tasks: a model is all they need."""

from __future__ import annotations

from distaff.tasks.classifier import Classifier

__all__ = ["Classifier"]

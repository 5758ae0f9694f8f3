"""Distaff: a training framework for JAX. Write a model and a loss; Distaff holds the loop."""

from __future__ import annotations

from distaff.garbage import spared

with spared():
    from distaff import (
        augment,
        callbacks,
        checkpoint,
        data,
        loggers,
        metrics,
        models,
        optim,
        tasks,
    )
    from distaff.callbacks import Callback, EarlyStopping, Profiler, StepInfo, StopTraining
    from distaff.context import Context
    from distaff.errors import DistaffError
    from distaff.models import Lora
    from distaff.monitor import Monitor
    from distaff.optim import OptimizerConfig
    from distaff.result import Best, TrainResult
    from distaff.state import TrainState
    from distaff.step import EvalStep, TrainStep, train_step
    from distaff.trainer import TrainerModule
    from distaff.trainer_config import TrainerConfig
    from distaff.weights import InitFrom, export_weights

__all__ = [
    "Best",
    "Callback",
    "Context",
    "DistaffError",
    "EarlyStopping",
    "EvalStep",
    "InitFrom",
    "Lora",
    "Monitor",
    "OptimizerConfig",
    "Profiler",
    "StepInfo",
    "StopTraining",
    "TrainResult",
    "TrainState",
    "TrainStep",
    "TrainerConfig",
    "TrainerModule",
    "augment",
    "callbacks",
    "checkpoint",
    "data",
    "export_weights",
    "loggers",
    "metrics",
    "models",
    "optim",
    "tasks",
    "train_step",
]

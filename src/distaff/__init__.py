"""Distaff: a training framework for JAX. Write a model and a loss; Distaff holds the loop."""

from __future__ import annotations

from importlib.metadata import version

from distaff.core.gc import spared

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
    from distaff.checkpoint.weights import InitFrom, TorchRules, export_weights
    from distaff.errors import DistaffError
    from distaff.export import export_model
    from distaff.loggers.history import History
    from distaff.metrics.monitor import Monitor
    from distaff.models import Lora, PrecisionConfig, RematConfig
    from distaff.optim import OptimizerConfig
    from distaff.run.result import Best, TrainResult
    from distaff.step.averages import EMA
    from distaff.step.context import Context
    from distaff.step.state import TrainState
    from distaff.step.step import EvalStep, TrainStep, train_step
    from distaff.trainer.config import TrainerConfig
    from distaff.trainer.module import TrainerModule

__all__ = [
    "EMA",
    "Best",
    "Callback",
    "Context",
    "DistaffError",
    "EarlyStopping",
    "EvalStep",
    "History",
    "InitFrom",
    "Lora",
    "Monitor",
    "OptimizerConfig",
    "PrecisionConfig",
    "Profiler",
    "RematConfig",
    "StepInfo",
    "StopTraining",
    "TorchRules",
    "TrainResult",
    "TrainState",
    "TrainStep",
    "TrainerConfig",
    "TrainerModule",
    "augment",
    "callbacks",
    "checkpoint",
    "data",
    "export_model",
    "export_weights",
    "loggers",
    "metrics",
    "models",
    "optim",
    "tasks",
    "train_step",
]

__version__ = version("distaff")

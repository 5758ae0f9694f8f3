"""Distaff: a training framework for JAX. Write a model and a loss; Distaff holds the loop.

JAX takes a second to import, so `import distaff` does not import it: the first name that you use
does, and loads all names at once. Type checkers and editors see the names as usual.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from distaff.core.gc import spare_imports, spared

if TYPE_CHECKING:
    from distaff import (
        augment,
        callbacks,
        checkpoint,
        data,
        distributed,
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
    from distaff.mesh import MeshConfig
    from distaff.metrics.monitor import Monitor
    from distaff.models import Lora, PrecisionConfig, RematConfig
    from distaff.optim import OptimizerConfig
    from distaff.plan import plan_recipe, plan_training
    from distaff.run.result import Best, TrainResult
    from distaff.step.averages import EMA
    from distaff.step.context import Context
    from distaff.step.state import TrainState
    from distaff.step.step import EvalStep, TrainStep, train_step
    from distaff.trainer.config import TrainerConfig
    from distaff.trainer.module import TrainerModule

    __version__: str

_PLACES = {
    "callbacks": ("Callback", "EarlyStopping", "Profiler", "StepInfo", "StopTraining"),
    "checkpoint.weights": ("InitFrom", "TorchRules", "export_weights"),
    "errors": ("DistaffError",),
    "export": ("export_model",),
    "loggers.history": ("History",),
    "mesh": ("MeshConfig",),
    "metrics.monitor": ("Monitor",),
    "models": ("Lora", "PrecisionConfig", "RematConfig"),
    "plan": ("plan_recipe", "plan_training"),
    "optim": ("OptimizerConfig",),
    "run.result": ("Best", "TrainResult"),
    "step.averages": ("EMA",),
    "step.context": ("Context",),
    "step.state": ("TrainState",),
    "step.step": ("EvalStep", "TrainStep", "train_step"),
    "trainer.config": ("TrainerConfig",),
    "trainer.module": ("TrainerModule",),
}
"""Public names by module. All other names in `__all__` are packages."""

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
    "MeshConfig",
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
    "distributed",
    "export_model",
    "export_weights",
    "loggers",
    "metrics",
    "models",
    "optim",
    "plan_recipe",
    "plan_training",
    "tasks",
    "train_step",
]


spare_imports()


def __getattr__(name: str) -> Any:
    """Loads the library when a name is first used; raises AttributeError for unknown names."""
    if name == "__version__":
        return import_module("importlib.metadata").version("distaff")
    if not name.startswith("__"):
        _load()
        if name in globals():
            return globals()[name]
    from distaff.errors import nearest

    raise AttributeError(f"Distaff has no attribute {name!r}. {nearest(name, __all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _load() -> None:
    """Imports every public name; a second call does nothing."""
    with spared():
        packages = [name for name in __all__ if name not in sum(_PLACES.values(), ())]
        for package in packages:
            import_module(f"distaff.{package}")
        for place, names in _PLACES.items():
            module = import_module(f"distaff.{place}")
            globals().update({name: getattr(module, name) for name in names})

"""Paths of values that members of a population may differ in, and which of them are traced."""

from __future__ import annotations

from typing import Any

from distaff.core.config.options import Tracing, tracing_of
from distaff.models.linen import LinenModel
from distaff.optim import OptimizerConfig, catalog
from distaff.optim.factory import is_factory
from distaff.trainer.module import TrainerModule

OPTIMIZER, OPTIONS, MODEL = "optimizer.", "options.", "model."
"""Prefixes of paths: fields of the optimizer, its options after that, and fields of the model."""

_RATE = "learning_rate"
_CLIPPING = ("clip_norm", "clip_value")

KNOWN = tuple(OPTIMIZER + name for name in (_RATE, "weight_decay", *_CLIPPING))
"""Paths whose values every optimizer of which they are traced takes as arguments."""


def value_of(trainer: TrainerModule, path: str) -> Any:
    """Returns the value of a trainer at a path; None where it has none."""
    if path.startswith(OPTIMIZER):
        name = path.removeprefix(OPTIMIZER)
        config: Any = trainer.optimizer
        if not isinstance(config, OptimizerConfig):
            return None
        if name.startswith(OPTIONS):
            return config.options.get(name.removeprefix(OPTIONS))
        return getattr(config, name, None)
    if path.startswith(MODEL):
        return getattr(trainer.model.module, path.removeprefix(MODEL), None)
    return getattr(trainer.config, path, None)


def form_of(trainer: TrainerModule, path: str, value: Any) -> str:
    """Returns what is static of a value: equal for values that one program serves.

    Args:
        trainer: the trainer of a member.
        path: the path of the value.
        value: the value.
    """
    rule = _rule(trainer, path)
    if rule == "never" or (rule == "unless zero" and value == 0):
        return repr(value)
    if _is_number(value):
        return "a number"
    if isinstance(value, tuple | list) and value and all(map(_is_number, value)):
        return f"{len(value)} numbers"
    return repr(value)


def _rule(trainer: TrainerModule, path: str) -> Tracing:
    """Returns whether a program may take the values at a path as arguments."""
    if path.startswith(OPTIMIZER):
        return _of_optimizer(trainer, path.removeprefix(OPTIMIZER))
    if path.startswith(MODEL):
        is_linen = isinstance(trainer.model, LinenModel)
        marked = tracing_of(type(trainer.model.module)) if is_linen else {}
        return marked.get(path.removeprefix(MODEL), "never")
    return tracing_of(type(trainer.config)).get(path, "never")


def _of_optimizer(trainer: TrainerModule, name: str) -> Tracing:
    config: Any = trainer.optimizer
    is_own = type(trainer).init_optimizer is not TrainerModule.init_optimizer
    if is_own or not isinstance(config, OptimizerConfig):
        return "never"
    if config.name in catalog.LEARNED or is_factory(config.name) or config.plateau is not None:
        return "never"
    if name == _RATE:
        return "never" if config.name in catalog.FIXED_RATE else "always"
    if name == "weight_decay":
        return "always" if catalog.takes_weight_decay(config.name) else "never"
    if name.startswith(OPTIONS):
        default = catalog.options_of(config.name).get(name.removeprefix(OPTIONS))
        is_number = default is not None and isinstance(default.default, float | None)
        return "always" if is_number else "never"
    return "always" if name in _CLIPPING else "never"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

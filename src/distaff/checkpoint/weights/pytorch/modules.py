"""The modules of a model of any kind, which decide the layouts of its arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from distaff.checkpoint.weights.pytorch.statistics import RunningStatistics, running_statistics
from distaff.models.adapter import Adapter, Model
from distaff.models.linen import LinenModel
from distaff.models.lora import LoraModel


class Modules(NamedTuple):
    """Modules of a model.

    Attributes:
        by_path: modules by path; empty for functions and a `Model` of your own.
        statistics: running statistics whose names do not say what they are.
    """

    by_path: dict[str, Any]
    statistics: Sequence[RunningStatistics] = ()


def modules_of(model: Model, init: Callable[[], Any]) -> Modules:
    """Returns the modules of a model.

    Args:
        model: the model; of a `Lora`, its base counts.
        init: creates the variables of a Flax Linen model; only traced.
    """
    if isinstance(model, LoraModel):
        return modules_of(model.inner, init)
    if isinstance(model, LinenModel):
        return Modules(_joined(_called(init)))
    if not isinstance(model, Adapter):
        return Modules({})
    by_path, named = _joined(model.modules()), model.named_state()
    return Modules(by_path, () if named is None else running_statistics(by_path, named))


def _joined(modules: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    return {"/".join(path): module for path, module in modules.items()}


def _called(init: Callable[[], Any]) -> dict[tuple[str, ...], nn.Module]:
    modules: dict[tuple[str, ...], nn.Module] = {}

    def record(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        modules.setdefault(context.module.path, context.module)
        return next_call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(lambda: init())  # a new function, because JAX caches traces
    return modules

"""The running statistics of Equinox, whose names in a state do not say what they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from distaff.checkpoint.weights.pytorch.layouts import kinds_of


class RunningStatistics(NamedTuple):
    """Names of the arrays of a `BatchNorm`.

    Attributes:
        path: path of the layer.
        mean: name of the running mean, such as `state/1`.
        variance: name of the running variance.
        ready: the other arrays, and their values where mean and variance need no correction.
        scale: returns the divisor of mean and variance, given the other arrays by name.
    """

    path: str
    mean: str
    variance: str
    ready: Mapping[str, Any]
    scale: Callable[[Mapping[str, Any]], float] = lambda arrays: 1.0


def running_statistics(modules: Mapping[str, Any], named: Any) -> list[RunningStatistics]:
    """Returns the names of the statistics of each `BatchNorm`.

    Args:
        modules: modules by path.
        named: an `equinox.nn.State` of the names of its arrays.
    """
    norms = {path: each for path, each in modules.items() if "BatchNorm" in kinds_of(each)}
    return [_statistics(path, each, named) for path, each in norms.items()]


def _statistics(path: str, layer: Any, named: Any) -> RunningStatistics:
    if layer.mode == "ema":
        mean, variance = named.get(layer.ema_state_index)
        ready = {named.get(layer.ema_first_time_index): False}
        return RunningStatistics(path, mean, variance, ready)
    mean, variance = named.get(layer.batch_state_index)
    counter, decay = named.get(layer.batch_counter), float(layer.momentum)

    def scale(arrays: Mapping[str, Any]) -> float:
        count = int(arrays[counter])
        return 1.0 if count == 0 else 1 - decay**count

    return RunningStatistics(path, mean, variance, {counter: _enough(decay)}, scale)


def _enough(decay: float) -> int:
    """Returns a number of updates after which the correction for the first ones rounds to 1."""
    return math.ceil(math.log(2.0**-26) / math.log(decay)) if decay > 0 else 1

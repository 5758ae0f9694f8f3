"""Optuna's figures of a study, drawn by matplotlib."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import optuna

_NAMES = {
    "history": "optimization_history",
    "curves": "intermediate_values",
    "importances": "param_importances",
    "parallel_coordinates": "parallel_coordinate",
}
_OF_VALUES = ("history", "importances", "parallel_coordinates")


def figures(study: optuna.Study, objectives: Sequence[str] = ()) -> dict[str, Any]:
    """Returns figures by name; without those that need more trials.

    Args:
        study: the study.
        objectives: names of the objectives in the order of their directions, if there are several.
            Then there is the Pareto front of two or three, and the figures of each.
    """
    finished = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    if len(finished) < 2:
        return {}
    plots: dict[str, tuple[str, dict[str, Any]]] = {}
    if not objectives:
        plots = {name: (kind, {}) for name, kind in _NAMES.items()}
    if 2 <= len(objectives) <= 3:
        plots["front"] = "pareto_front", {"target_names": list(objectives)}
    for place, metric in enumerate(objectives):
        target = {"target": partial(_value, place=place), "target_name": metric}
        for name in _OF_VALUES:
            plots[f"{name}_{metric.replace('/', '_')}"] = _NAMES[name], target
    drawn = {name: _figure(study, *plot) for name, plot in plots.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _value(trial: optuna.trial.FrozenTrial, place: int) -> float:
    return (trial.values or ())[place]


def _figure(study: optuna.Study, kind: str, options: dict[str, Any]) -> Any:
    plot = getattr(optuna.visualization.matplotlib, f"plot_{kind}")
    with warnings.catch_warnings():  # Optuna calls its figures by matplotlib experimental
        warnings.simplefilter("ignore")
        try:
            figure = plot(study, **options).figure
        except (RuntimeError, ValueError):  # such as importances of equal values
            return None
        figure.set_size_inches(9, 6)
        figure.tight_layout()  # else long names are cut off
    return figure

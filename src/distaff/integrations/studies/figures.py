"""Optuna's figures of a study, drawn by matplotlib."""

from __future__ import annotations

import warnings
from typing import Any

import optuna

_NAMES = {
    "history": "optimization_history",
    "curves": "intermediate_values",
    "importances": "param_importances",
    "parallel_coordinates": "parallel_coordinate",
}


def figures(study: optuna.Study) -> dict[str, Any]:
    """Returns figures by name; without those that need more trials."""
    finished = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    found: dict[str, Any] = {}
    if len(finished) < 2:
        return found
    with warnings.catch_warnings():  # Optuna calls its figures by matplotlib experimental
        warnings.simplefilter("ignore")
        for name, kind in _NAMES.items():
            plot = getattr(optuna.visualization.matplotlib, f"plot_{kind}")
            try:
                axes = plot(study)
            except (RuntimeError, ValueError):  # such as importances of equal values
                continue
            found[name] = axes.figure
            axes.figure.set_size_inches(9, 6)
            axes.figure.tight_layout()  # else long names are cut off
    return found

"""Further attempts of trials whose process was interrupted or killed."""

from __future__ import annotations

from optuna.trial import FrozenTrial, TrialState, create_trial


def retry(trial: FrozenTrial, place: int, num_attempts: int) -> FrozenTrial:
    """Returns a waiting trial with the values of an abandoned one, which Optuna tries first.

    It resumes the run of the abandoned one, unless the user's code ended that.

    Args:
        trial: the abandoned trial.
        place: its number without the trials that repeat others.
        num_attempts: attempts without progress so far, with this one.
    """
    path = trial.user_attrs.get("path", trial.user_attrs.get("left"))
    resumes = path is not None and "restart" not in trial.user_attrs
    # Rungs are the state of a halving pruner for a run that starts again.
    is_kept = {n: resumes or not n.startswith("completed_rung") for n in trial.system_attrs}
    values = trial.intermediate_values if resumes else {}
    reached = max(len(values), trial.user_attrs.get("reached", 0)) if resumes else 0
    has_waited = trial.user_attrs.get("waits", False)
    has_advanced = reached > trial.user_attrs.get("inherited", 0)
    facts = {
        "attempt": 1 if has_advanced else num_attempts + (not has_waited),
        "inherited": reached,
        "reached": reached,
        "origin": trial.user_attrs.get("origin", place),
        "retry_of": trial.number,
        "left": path if resumes else None,
    }
    return create_trial(
        state=TrialState.WAITING,
        params=trial.params,
        distributions=trial.distributions,
        system_attrs={n: x for n, x in trial.system_attrs.items() if is_kept[n]},
        user_attrs=facts,
        intermediate_values=values,
    )

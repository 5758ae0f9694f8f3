"""The mean and the divisor of fitted scalers of scikit-learn, without importing it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from distaff.errors import BatchError, ConfigError

SCALERS = ("StandardScaler", "MinMaxScaler", "MaxAbsScaler", "RobustScaler")

_RESOLUTION = 0.01


def affine(transformer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(mean, std)`, float64 `[features]`, with `transform(x) == (x - mean) / std`.

    Args:
        transformer: a fitted `StandardScaler`, `MinMaxScaler`, `MaxAbsScaler` or `RobustScaler`, or
            a `Pipeline` of them.

    Raises:
        ConfigError: it is another transformer, is not fitted, or clips values.
    """
    name = type(transformer).__name__
    if name == "Pipeline":
        return _chained(
            [step for _, step in transformer.steps if step not in (None, "passthrough")]
        )
    if name not in SCALERS or not type(transformer).__module__.startswith("sklearn."):
        raise ConfigError(
            f"from_sklearn takes a fitted {', '.join(SCALERS)}, or a Pipeline of them; got a "
            f"{name}. Other transformers do not compute (x - mean) / std. Try data.Transform."
            "from_sklearn, or transform the arrays before, and save the transformer with your data."
        )
    if not hasattr(transformer, "n_features_in_"):
        raise ConfigError(f"The {name} must be fitted. Call fit(x_train) before.")
    if getattr(transformer, "clip", False):
        raise ConfigError(
            f"The {name} has clip=True, which is not (x - mean) / std. Fit it with clip=False."
        )
    mean, std = _parameters(name, transformer)
    size = transformer.n_features_in_
    return (
        np.zeros(size) if mean is None else np.asarray(mean, np.float64),
        np.ones(size) if std is None else np.asarray(std, np.float64),
    )


def _parameters(name: str, fitted: Any) -> tuple[Any, Any]:
    match name:
        case "StandardScaler":
            return fitted.mean_ if fitted.with_mean else None, fitted.scale_
        case "MinMaxScaler":
            scale = np.asarray(fitted.scale_, np.float64)
            return -fitted.min_ / scale, 1 / scale
        case "MaxAbsScaler":
            return None, fitted.scale_
        case _:
            return fitted.center_, fitted.scale_


def _chained(steps: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    if not steps:
        raise ConfigError("The Pipeline has no steps. Leave standardize out.")
    mean, std = affine(steps[0])
    for step in steps[1:]:
        inner_mean, inner_std = affine(step)
        mean, std = mean + std * inner_mean, std * inner_std
    return mean, std


def check_resolution(name: str, mean: np.ndarray, std: np.ndarray) -> None:
    """Checks that batches, which have float32 by default, keep the differences between values.

    Args:
        name: name of the input.
        mean: what is subtracted from each feature.
        std: the divisor of each feature.

    Raises:
        BatchError: float32 has too few digits for a feature.
    """
    dtype = jax.dtypes.canonicalize_dtype(np.float64)
    steps = np.spacing(np.abs(mean).astype(dtype))
    bad = np.argwhere(steps > _RESOLUTION * std)
    if len(bad):
        at = tuple(bad[0])
        raise BatchError(
            f"Feature {[int(i) for i in at]} of the input {name!r} has mean {mean[at]:.6g} and "
            f"standard deviation {std[at]:.3g}, but {dtype} has steps of {steps[at]:.3g} there. "
            "Subtract a constant from it before, in float64, or set jax_enable_x64."
        )

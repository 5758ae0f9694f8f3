"""The numbers of fitted transformers of scikit-learn, without importing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from distaff.data.tables.scalers import SCALERS, affine
from distaff.errors import ConfigError


def steps_of(transformer: Any) -> Iterator[dict[str, Any]]:
    """Yields the steps of a fitted transformer, as `Transform.steps` has them.

    Raises:
        ConfigError: it is another transformer, is not fitted, or has an option that is not
            supported.
    """
    name = type(transformer).__name__
    if name == "Pipeline":
        steps = [step for _, step in transformer.steps if step not in (None, "passthrough")]
        if not steps:
            raise ConfigError("The Pipeline has no steps. Leave standardize out.")
        for step in steps:
            yield from steps_of(step)
        return
    known = (*SCALERS, *_STEPS)
    if name not in known or not type(transformer).__module__.startswith("sklearn."):
        raise ConfigError(
            f"from_sklearn takes a fitted {', '.join(known)}, or a Pipeline of them; got a {name}. "
            "Transform the arrays before, and save the transformer with your data."
        )
    if not hasattr(transformer, "n_features_in_"):
        raise ConfigError(f"The {name} must be fitted. Call fit(x_train) before.")
    if name in SCALERS:
        yield _scaling(transformer)
    else:
        yield from _STEPS[name](transformer)


def nested(value: Any) -> Any:
    """Converts arrays and lists to nested tuples of Python numbers, as a config holds them."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(map(nested, value)) if isinstance(value, list | tuple) else value


def _scaling(scaler: Any) -> dict[str, Any]:
    mean, std = affine(scaler)
    return {"kind": "scale", "mean": mean, "std": std}


def _pca(fitted: Any) -> Iterator[dict[str, Any]]:
    matrix = np.asarray(fitted.components_, np.float64).T
    if fitted.whiten:
        std = np.sqrt(np.asarray(fitted.explained_variance_))
        matrix = matrix / np.maximum(std, np.finfo(std.dtype).eps)
    yield {"kind": "project", "mean": fitted.mean_, "matrix": matrix}


def _truncated_svd(fitted: Any) -> Iterator[dict[str, Any]]:
    matrix = np.asarray(fitted.components_, np.float64).T
    yield {"kind": "project", "mean": np.zeros(len(matrix)), "matrix": matrix}


def _normalizer(fitted: Any) -> Iterator[dict[str, Any]]:
    yield {"kind": "normalize", "norm": fitted.norm}


def _power(fitted: Any) -> Iterator[dict[str, Any]]:
    yield {"kind": fitted.method, "powers": fitted.lambdas_}
    if fitted.standardize:
        yield _scaling(fitted._scaler)


def _imputer(fitted: Any) -> Iterator[dict[str, Any]]:
    missing = fitted.missing_values
    if fitted.add_indicator:
        raise ConfigError(
            "The SimpleImputer has add_indicator=True, which adds features. Fit it with "
            "add_indicator=False."
        )
    try:
        values, missing = np.asarray(fitted.statistics_, np.float64), float(missing)
    except (TypeError, ValueError):
        raise ConfigError(
            f"The SimpleImputer must fill numbers with numbers; it fills {missing!r} with "
            f"{fitted.statistics_.tolist()}. Encode the columns as floats before."
        ) from None
    columns = np.arange(len(values))
    if not fitted.keep_empty_features:
        columns = columns[~np.isnan(values)]
    yield {
        "kind": "fill",
        "missing": None if np.isnan(missing) else missing,
        "values": values[columns],
        "columns": columns,
    }


_STEPS: dict[str, Callable[[Any], Iterator[dict[str, Any]]]] = {
    "PCA": _pca,
    "TruncatedSVD": _truncated_svd,
    "Normalizer": _normalizer,
    "PowerTransformer": _power,
    "SimpleImputer": _imputer,
}

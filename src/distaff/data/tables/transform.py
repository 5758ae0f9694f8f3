"""Transform: a fitted transformer of scikit-learn, computed in each forward pass by its numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.typing import PyTree
from distaff.data.tables.scalers import check_resolution
from distaff.data.tables.transformers import nested, steps_of
from distaff.errors import BatchError, ConfigError, leaf_name

_MOST_NUMBERS = 100_000


@dataclasses.dataclass(frozen=True)
class Transform:
    """The steps of a fitted transformer of scikit-learn.

    Make it by `from_sklearn`, and pass it to a trainer as the option `standardize`: every forward
    pass then transforms the model's first input, in training, evaluation and prediction. The
    numbers are saved in `config.json`, and a loaded trainer has them.

    Attributes:
        features: number of features of the input.
        steps: what is computed, in this order: each a dict with its `kind` and its numbers.
        name: name of the leaf `[examples, features]` that is transformed; an input that is one
            array is `inputs`. Other leaves stay as they are.
    """

    features: int
    steps: tuple[Mapping[str, Any], ...]
    name: str = "inputs"

    def __post_init__(self) -> None:
        steps = tuple({n: nested(x) for n, x in step.items()} for step in self.steps)
        object.__setattr__(self, "steps", steps)
        unknown = [step.get("kind") for step in steps if step.get("kind") not in _FORMULAS]
        if unknown or not steps:
            raise ConfigError(
                f"A Transform has steps of the kinds {sorted(_FORMULAS)}; got {unknown}. Make it "
                "with Transform.from_sklearn(transformer)."
            )

    @classmethod
    def from_sklearn(cls, transformer: Any, *, name: str = "inputs") -> Transform:
        """Returns the same steps as a fitted transformer of scikit-learn.

        Args:
            transformer: a `PCA`, `TruncatedSVD`, `PowerTransformer`, `SimpleImputer`, `Normalizer`,
                a scaler that `Standardize.from_sklearn` takes, or a `Pipeline` of these. It must be
                fitted on inputs `[examples, features]` with the columns of the model's input, in
                its order.
            name: the name of the leaf `[examples, features]` if the model's input is a dict.

        Raises:
            BatchError: float32 cannot resolve the differences between the values of a feature.
            ConfigError: it is another transformer, is not fitted, has an option that is not
                supported, or has too many numbers.
        """
        steps = tuple(steps_of(transformer))
        first = steps[0]
        if first["kind"] == "scale":
            check_resolution(name, first["mean"], first["std"])
        count = sum(np.size(x) for step in steps for x in step.values())
        if count > _MOST_NUMBERS:
            raise ConfigError(
                f"The transformer has {count} numbers, more than the {_MOST_NUMBERS} that a config "
                "may hold. Use fewer components, or transform the arrays before."
            )
        return cls(int(transformer.n_features_in_), steps, name)

    def __repr__(self) -> str:
        return f"Transform({' -> '.join(step['kind'] for step in self.steps)})"

    def __call__(self, inputs: PyTree) -> PyTree:
        """Returns transformed inputs: one array `[examples, features]`, or a dict of arrays.

        Raises:
            BatchError: there is no such leaf, or it has another shape than the data of `fit`.
        """
        names = [_name(path) for path, _ in jax.tree.leaves_with_path(inputs)]
        if self.name not in names:
            raise BatchError(
                f"The transform is for the input {self.name!r}, but the model's input has {names}. "
                "Write Transform.from_sklearn(transformer, name=...)."
            )
        return jax.tree.map_with_path(self._transformed, inputs)

    def _transformed(self, path: tuple[Any, ...], x: Any) -> Any:
        if _name(path) != self.name:
            return x
        if x.ndim != 2 or x.shape[1] != self.features:
            raise BatchError(
                f"The transform was fitted on {self.features} features, [examples, "
                f"{self.features}], but the input {self.name!r} has shape {x.shape}. Fit it on "
                "data of this shape."
            )
        x = x.astype(np.promote_types(x.dtype, np.float32))
        for step in self.steps:
            numbers = {n: each for n, each in step.items() if n != "kind"}
            x = _FORMULAS[step["kind"]](np if isinstance(x, np.ndarray) else jnp, x, **numbers)
        return x


def _name(path: tuple[Any, ...]) -> str:
    return leaf_name(path) if path else "inputs"


def _row(x: Any, numbers: Any) -> np.ndarray:
    """Returns one number per feature as an array `[1, features]` of the dtype of `x`."""
    return np.asarray(numbers, x.dtype)[None]


def _scale(xp: Any, x: Any, mean: Any, std: Any) -> Any:
    return (x - _row(x, mean)) / _row(x, std)


def _project(xp: Any, x: Any, mean: Any, matrix: Any) -> Any:
    centred = x - _row(x, mean)
    # Not a matrix product: its operands may be rounded, by `precision` or by the accelerator.
    return xp.sum(centred[:, :, None] * np.asarray(matrix, x.dtype)[None], axis=1)


def _fill(xp: Any, x: Any, missing: Any, values: Any, columns: Any) -> Any:
    x = x[:, np.asarray(columns, np.int32)]
    is_missing = xp.isnan(x) if missing is None else x == np.asarray(missing, x.dtype)
    return xp.where(is_missing, _row(x, values), x)


def _normalize(xp: Any, x: Any, norm: str) -> Any:
    size = xp.abs(x)
    length = {
        "l1": lambda: xp.sum(size, axis=1, keepdims=True),
        "l2": lambda: xp.sqrt(xp.sum(size * size, axis=1, keepdims=True)),
        "max": lambda: xp.max(size, axis=1, keepdims=True),
    }[norm]()
    return x / xp.where(length == 0, xp.ones_like(length), length)


def _yeo_johnson(xp: Any, x: Any, powers: Any) -> Any:
    powers = _row(x, powers)
    above = _box_cox_of_log(xp, xp.log1p(xp.maximum(x, 0)), powers)
    below = _box_cox_of_log(xp, xp.log1p(xp.maximum(-x, 0)), 2 - powers)
    return above - below


def _box_cox(xp: Any, x: Any, powers: Any) -> Any:
    return _box_cox_of_log(xp, xp.log(x), _row(x, powers))


def _box_cox_of_log(xp: Any, log: Any, powers: np.ndarray) -> Any:
    """Returns `(exp(log)**powers - 1) / powers`, which is `log` for a power of 0."""
    is_zero = powers == 0
    return xp.where(is_zero, log, xp.expm1(log * powers) / np.where(is_zero, 1, powers))


_FORMULAS: dict[str, Callable[..., Any]] = {
    "scale": _scale,
    "project": _project,
    "fill": _fill,
    "normalize": _normalize,
    "yeo-johnson": _yeo_johnson,
    "box-cox": _box_cox,
}

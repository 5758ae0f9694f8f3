"""Standardize: inputs with mean 0 and standard deviation 1, by the statistics of training data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.typing import PyTree
from distaff.data.entry import INPUT_NAMES, entry, named
from distaff.data.loader import Loader, as_loader, in_order
from distaff.data.tables.scalers import affine, check_resolution
from distaff.data.whole import whole_arrays
from distaff.errors import BatchError, ConfigError, leaf_name

_ROWS = 4096
_MOST_NUMBERS = 100_000


@dataclasses.dataclass(frozen=True)
class Standardize:
    """Subtracts the mean of each input feature and divides by its standard deviation.

    Make it by `fit`, from the training data alone, or from a fitted scaler of scikit-learn by
    `from_sklearn`, and pass it to a trainer as the option `standardize`: every forward pass then
    standardizes the model's first input, in training, evaluation and prediction. The numbers are
    saved in `config.json`, and a loaded trainer has them. Leaves of integers, such as coded
    categories, stay as they are.

    Attributes:
        mean: the mean of each float leaf of the input by its name, as nested tuples
            `[features...]`, or what a scaler subtracts; an input that is one array is `inputs`.
        std: the standard deviation, likewise, or what a scaler divides by; 1 for a feature that is
            constant.

    >>> scale = Standardize.fit(np.array([[0.0, 5.0], [2.0, 5.0]]))
    >>> scale(np.array([[4.0, 5.0]])).tolist()
    [[3.0, 0.0]]
    """

    mean: Mapping[str, Any]
    std: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, {n: _tuples(x) for n, x in getattr(self, name).items()})
        if self.mean.keys() != self.std.keys() or not self.mean:
            raise ConfigError(
                f"mean and std must be of the same inputs; got {list(self.mean)} and "
                f"{list(self.std)}. Make them with Standardize.fit(train)."
            )

    @classmethod
    def fit(cls, train: Any, *, axis: int | Sequence[int] = 0) -> Standardize:
        """Returns the mean and standard deviation of the inputs, computed in one pass in float64.

        Args:
            train: the training data alone, so that validation and test data stay unseen: arrays
                such as `(x, y)`, the inputs, or a loader, which does not move if it has `in_order`.
            axis: the axes to average over, of `[examples, ...]`; always with the first. For one
                mean per channel of images `[examples, height, width, channels]`, `(0, 1, 2)`.

        Raises:
            BatchError: an input is not finite, there are no float inputs, or float32 cannot resolve
                the differences between the values of a feature.
            ConfigError: `axis` does not hold the first axis, or leaves too many features.
        """
        axes = (axis,) if isinstance(axis, int) else tuple(axis)
        if 0 not in axes:
            raise ConfigError(f"axis must hold 0, the axis of the examples; got {axis!r}.")
        sums: dict[str, _Moments] = {}
        for batch in _batches(train):
            for path, leaf in jax.tree.leaves_with_path(_inputs(batch)):
                if jnp.issubdtype(leaf.dtype, jnp.floating):
                    name = _name(path)
                    sums[name] = _moments(name, leaf, axes).merged(sums.get(name))
        if not sums:
            raise BatchError(
                "There must be an input of floats to standardize. Convert the inputs: "
                "x.astype(numpy.float32)."
            )
        found = {name: each.result(name) for name, each in sums.items()}
        mean, std = ({name: pair[i] for name, pair in found.items()} for i in (0, 1))
        return cls(mean, std)

    @classmethod
    def from_sklearn(cls, scaler: Any, *, name: str = "inputs") -> Standardize:
        """Returns the same scaling as a fitted scaler of scikit-learn.

        Args:
            scaler: a `StandardScaler`, `MinMaxScaler`, `MaxAbsScaler` or `RobustScaler`, or a
                `Pipeline` of them, fitted on inputs `[examples, features]` with the columns of the
                model's input, in its order.
            name: the name of the leaf `[examples, features]` if the model's input is a dict.

        Raises:
            BatchError: float32 cannot resolve the differences between the values of a feature.
            ConfigError: it is another transformer, is not fitted, or clips values.
        """
        mean, std = affine(scaler)
        check_resolution(name, mean, std)
        return cls({name: mean}, {name: std})

    def __repr__(self) -> str:
        shapes = {name: np.shape(x) for name, x in self.mean.items()}
        return f"Standardize({shapes})"

    def __call__(self, inputs: PyTree) -> PyTree:
        """Returns standardized inputs: one array `[examples, features...]`, or a dict of arrays.

        Raises:
            BatchError: they have other leaves or other shapes than the data of `fit`.
        """
        paths = jax.tree.leaves_with_path(inputs)
        floats = [_name(p) for p, x in paths if jnp.issubdtype(x.dtype, jnp.floating)]
        if missing := self.mean.keys() ^ set(floats):
            raise BatchError(
                f"Standardize was fitted on float inputs {list(self.mean)}, but the model's input "
                f"has {floats}; they differ in {sorted(missing)}. Fit it on the inputs of the "
                "model, or cast them to float."
            )
        return jax.tree.map_with_path(self._standardized, inputs)

    def _standardized(self, path: tuple[Any, ...], x: Any) -> Any:
        name = _name(path)
        if name not in self.mean:
            return x
        dtype = np.promote_types(x.dtype, np.float32)
        mean, std = (np.asarray(each[name], dtype)[None] for each in (self.mean, self.std))
        fits = [own in (1, size) for own, size in zip(mean.shape, x.shape, strict=False)]
        if mean.ndim != x.ndim or not all(fits):
            raise BatchError(
                f"Standardize was fitted on features {mean.shape[1:]} of the input {name!r}, but a "
                f"batch has shape {x.shape}. Fit it on data of this shape."
            )
        return (x.astype(dtype) - mean) / std


@dataclasses.dataclass(frozen=True)
class _Moments:
    """Count, mean, and sum of squared differences from the mean; see Chan et al. 1983."""

    count: int
    mean: np.ndarray
    squares: np.ndarray

    def merged(self, other: _Moments | None) -> _Moments:
        if other is None:
            return self
        count = self.count + other.count
        delta = other.mean - self.mean
        return _Moments(
            count,
            self.mean + delta * (other.count / count),
            self.squares + other.squares + np.square(delta) * (self.count * other.count / count),
        )

    def result(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns mean and standard deviation, which is 1 for a constant feature."""
        if self.mean.size > _MOST_NUMBERS:
            raise ConfigError(
                f"The input {name!r} has {self.mean.size} features, more than {_MOST_NUMBERS}. "
                "Average over more axes, such as axis=(0, 1, 2) for one mean per channel."
            )
        variance = self.squares / self.count
        # As in scikit-learn: what the rounding of equal values may leave.
        epsilon = np.finfo(np.float64).eps
        bound = self.count * epsilon * variance + (self.count * self.mean * epsilon) ** 2
        std = np.where(variance <= bound, 1.0, np.sqrt(variance))
        check_resolution(name, self.mean, std)
        return self.mean, std


def _moments(name: str, leaf: Any, axes: tuple[int, ...]) -> _Moments:
    x = np.asarray(leaf, np.float64)
    if max(axes) >= x.ndim or min(axes) < 0:
        raise ConfigError(f"axis must be among the {x.ndim} axes of {name!r}; got {axes}.")
    if not np.isfinite(x).all():
        example, *feature = np.argwhere(~np.isfinite(x))[0].tolist()
        raise BatchError(
            f"Inputs must be finite to be standardized; feature {feature} of the input {name!r} is "
            f"{x[(example, *feature)]} in an example. Fill or drop missing values."
        )
    mean = x.mean(axis=axes, keepdims=True)
    squares = np.square(x - mean).sum(axis=axes, keepdims=True)
    return _Moments(math.prod(x.shape[axis] for axis in axes), mean[0], squares[0])


def _name(path: tuple[Any, ...]) -> str:
    return leaf_name(path) if path else "inputs"


def _batches(train: Any) -> Iterator[Any]:
    arrays = whole_arrays(train, "given")
    if arrays is None:
        yield from _one_pass(as_loader(train))
        return
    for start in range(0, len(jax.tree.leaves(arrays)[0]), _ROWS):
        yield jax.tree.map(lambda array, at=start: array[at : at + _ROWS], arrays)


def _one_pass(loader: Loader) -> Iterator[Any]:
    view = in_order(loader)
    if view is not None:
        yield from view
        return
    state = loader.get_state()
    yield from loader
    loader.set_state(state)


def _inputs(batch: Any) -> PyTree:
    if hasattr(batch, "shape"):
        return batch
    try:
        return entry(batch, INPUT_NAMES, 0, what="The input", override="")
    except BatchError:
        held = list(named(batch)) or type(batch).__name__
        raise BatchError(
            f"The inputs to standardize must have one of the names {list(INPUT_NAMES)}, or be the "
            f"first item of a tuple; the data hold {held}. Pass the inputs alone: "
            "Standardize.fit(x)."
        ) from None


def _tuples(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else float(value)

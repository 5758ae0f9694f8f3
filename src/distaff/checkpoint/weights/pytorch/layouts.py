"""Layouts of one array in PyTorch and in a model, by the kind of its layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from distaff.errors import ConfigError

Shape: TypeAlias = tuple[int, ...]


UNKNOWN = object()
"""The module of an array, where a model has modules but not that one."""


class Layout(NamedTuple):
    """A bijection between an array in PyTorch and one in the model.

    Attributes:
        shape: returns the shape in PyTorch of an array of the model.
        load: returns the array of the model, given the one of PyTorch and the shape.
        save: returns the array of PyTorch.
    """

    shape: Callable[[Shape], Shape]
    load: Callable[[np.ndarray, Shape], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]


AS_IS = Layout(lambda shape: shape, lambda array, shape: array, lambda array: array)

FLAT = Layout(
    lambda shape: (math.prod(shape),),
    lambda array, shape: array.reshape(shape),
    lambda array: array.reshape(-1),
)
"""A bias: by heads in Flax attention, with axes of length 1 in a convolution of Equinox."""


def linear(num_inputs: int = 1) -> Layout:
    """Returns the layout of a kernel `[*in, *out]`, which is `[out, in]` in PyTorch.

    Args:
        num_inputs: number of input axes; 2 for the last kernel of Flax attention.
    """

    def shape_of(shape: Shape) -> Shape:
        return math.prod(shape[num_inputs:]), math.prod(shape[:num_inputs])

    return Layout(
        shape_of,
        lambda array, shape: array.T.reshape(shape),
        lambda array: array.reshape(math.prod(array.shape[:num_inputs]), -1).T,
    )


def transposed(layout: Layout) -> Layout:
    """Returns a layout for a matrix that is stored as `[in, out]` in PyTorch."""
    return Layout(
        lambda shape: layout.shape(shape)[::-1],
        lambda array, shape: layout.load(array.T, shape),
        lambda array: layout.save(array).T,
    )


def _permuted(to_model: Callable[[int], Sequence[int]], *, flipped: bool = False) -> Layout:
    """Returns a layout that permutes axes, given PyTorch's axes in the order of the model."""

    def flip(array: np.ndarray) -> np.ndarray:
        return np.flip(array, tuple(range(2, array.ndim))) if flipped else array

    return Layout(
        lambda shape: tuple(shape[n] for n in np.argsort(to_model(len(shape)))),
        lambda array, shape: flip(array).transpose(to_model(array.ndim)),
        lambda array: flip(array.transpose(np.argsort(to_model(array.ndim)))),
    )


CONV = _permuted(lambda ndim: (*range(2, ndim), 1, 0))
"""`[out, in, *window]` in PyTorch, `[*window, in, out]` in Flax; grouped ones, too."""

CONV_TRANSPOSE = _permuted(lambda ndim: (*range(2, ndim), 0, 1), flipped=True)
"""`[in, out, *window]` in PyTorch, whose window is the one of Flax in reverse order."""

CONV_TRANSPOSE_KERNEL = _permuted(lambda ndim: (*range(2, ndim), 1, 0))
"""The same under `transpose_kernel=True`, where Flax itself flips `[*window, out, in]`."""


def equinox_conv_transpose(groups: int) -> Layout:
    """Returns the layout of `[out, in / groups, *window]` in Equinox; it is flipped in PyTorch."""

    def swapped(array: np.ndarray) -> np.ndarray:
        split = array.reshape(groups, array.shape[0] // groups, *array.shape[1:])
        joined = split.swapaxes(1, 2).reshape(-1, split.shape[1], *array.shape[2:])
        return np.flip(joined, tuple(range(2, array.ndim)))

    def shape_of(shape: Shape) -> Shape:
        return shape[1] * groups, shape[0] // groups, *shape[2:]

    return Layout(shape_of, lambda array, shape: swapped(array), swapped)


def layout_of(name: str, shape: Shape, siblings: Collection[str], module: Any) -> Layout:
    """Returns the layout of an array by the kind of its layer, never by its shape alone.

    Args:
        name: path of the array, for errors.
        shape: shape in the model.
        siblings: names of the arrays of the same module.
        module: the module; None in a model given as functions, whose kernels with more than two
            axes are convolutions; `UNKNOWN` in another model.

    Raises:
        ConfigError: PyTorch has no such layer.
    """
    leaf, kinds = name.rpartition("/")[2], kinds_of(module)
    if leaf == "bias":
        is_flat = "kernel" in siblings or all(size == 1 for size in shape[1:])
        return FLAT if is_flat else AS_IS
    if leaf == "weight" and "ConvTranspose" in kinds:
        return equinox_conv_transpose(module.groups)
    return _of_kernel(name, shape, kinds, module) if leaf == "kernel" else AS_IS


def _of_kernel(name: str, shape: Shape, kinds: set[str], module: Any) -> Layout:
    if "ConvTranspose" in kinds:
        return CONV_TRANSPOSE_KERNEL if module.transpose_kernel else CONV_TRANSPOSE
    if kinds & {"DenseGeneral", "LinearGeneral"}:
        outputs = np.size(module.features if hasattr(module, "features") else module.out_features)
        if getattr(module, "batch_dims", ()) or getattr(module, "batch_axis", ()):
            raise _unsupported(name, shape, "has batch axes")
        return linear(len(shape) - outputs)
    if kinds & {"Dense", "Linear"} and len(shape) != 2:
        raise ConfigError(
            f"The kernel of a {type(module).__name__} has two axes; {name!r} is {list(shape)} for "
            "each tensor in PyTorch. Layers that are stacked, as by nn.scan or nnx.vmap, have {} "
            "in PyTorch only: TorchRules({'layers.{}': 'layers'})."
        )
    if len(shape) > 2 and module is UNKNOWN:
        raise _unsupported(name, shape, "belongs to a module that is not called by itself")
    if kinds & {"ConvLocal", "Einsum"}:
        raise _unsupported(name, shape, f"belongs to a {type(module).__name__}")
    if len(shape) < 2:
        return AS_IS
    return linear() if len(shape) == 2 else CONV


def kinds_of(module: Any) -> set[str]:
    """Returns the names of the classes of Flax and Equinox that a module inherits from."""
    libraries = ("flax", "equinox")
    return {c.__name__ for c in type(module).__mro__ if c.__module__.startswith(libraries)}


def _unsupported(name: str, shape: Shape, what: str) -> ConfigError:
    return ConfigError(
        f"The rules for PyTorch have no layout for {name!r}, {list(shape)}: it {what}. Convert it "
        "by hand, and pass a tree of arrays as the source."
    )

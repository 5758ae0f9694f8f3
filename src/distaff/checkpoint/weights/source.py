"""Sources of weights, which list their arrays before reading them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

import distaff.checkpoint as checkpoint
from distaff.checkpoint import arrays
from distaff.checkpoint.weights.names import named
from distaff.core import optional
from distaff.core.paths import as_path
from distaff.core.typing import PyTree
from distaff.errors import CheckpointError, ConfigError
from distaff.models import Variables
from distaff.step.averages import RAW

_AVERAGES = "averages"

EVALUATION_PARAMS = "evaluation-params"
"""The key in a checkpoint of the parameters for evaluation, if they differ from `params`."""

SUFFIX = ".safetensors"

ShapeAndDtype: TypeAlias = tuple[tuple[int, ...], Any]


class WeightSource(NamedTuple):
    """Named arrays from a tree, file or checkpoint.

    Attributes:
        origin: description of the source, for errors.
        forms: shape and dtype of each array by name, see `named`.
        read: returns arrays by name.
        unused: shape and dtype of arrays in the file that are not one of the model.
        wrong: why an array of the model cannot be read, by name.
        absent: where an array of the model was looked for, by name.
    """

    origin: str
    forms: dict[str, ShapeAndDtype]
    read: Callable[[Sequence[str]], dict[str, np.ndarray]]
    unused: Mapping[str, ShapeAndDtype] = MappingProxyType({})
    wrong: Mapping[str, str] = MappingProxyType({})
    absent: Mapping[str, str] = MappingProxyType({})


def open_source(source: Any, weights: str | None = None) -> WeightSource:
    """Opens the source of an `InitFrom` without reading arrays.

    Args:
        source: a path or a tree of arrays.
        weights: see `InitFrom`.

    Raises:
        CheckpointError: it cannot be read, or does not have these weights.
        ConfigError: it is neither a path nor a tree of arrays, or `weights` is given for something
            else than a checkpoint.
        MissingExtraError: it is a safetensors file, and the package is not installed.
    """
    path = as_path(source, "init_from") if isinstance(source, str | os.PathLike) else None
    if path is not None and path.suffix != SUFFIX:
        return _of_checkpoint(path, weights)
    if weights is not None:
        raise ConfigError(
            f"weights={weights!r} needs a run directory or a checkpoint folder as the source of "
            "InitFrom; any other source has one kind of weights. Remove weights=..."
        )
    return _of_tree(source) if path is None else _of_file(path)


def _of_tree(tree: PyTree) -> WeightSource:
    leaves = named(tree)
    for name, leaf in leaves.items():
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise ConfigError(
                f"init_from is a path or a tree of arrays; {name!r} in it is a "
                f"{type(leaf).__name__}. Pass a run directory, a checkpoint folder, a "
                f"{SUFFIX} file, or parameters."
            )
    if not leaves:
        raise ConfigError("init_from is a path or a tree of arrays; got a tree without arrays.")
    forms = {name: (tuple(leaf.shape), _native(leaf.dtype)) for name, leaf in leaves.items()}
    return WeightSource(
        "the tree", forms, lambda names: {name: np.asarray(leaves[name]) for name in names}
    )


def _of_file(path: Path) -> WeightSource:
    if not path.is_file():  # reading a pipe would block
        raise CheckpointError(f"init_from must be a regular file; {path} is not. Check the path.")
    library = optional.load("safetensors", extra="safetensors")
    return WeightSource(str(path), library.forms(path), partial(library.read, path))


def _of_checkpoint(path: Path, weights: str | None) -> WeightSource:
    store, step, folder = checkpoint.located(path)
    problem = store.check(step)  # first, because threads of Orbax outlive a failed read
    if problem is not None:
        raise CheckpointError(
            f"The checkpoint {folder} cannot be read: {problem}. Pass another one."
        )
    info = store.info(step)
    average = _average_of(info, weights, folder)
    saved_as = {
        _AVERAGES: _AVERAGES if average else "",
        "params": EVALUATION_PARAMS if info.get(EVALUATION_PARAMS) else "params",
        "batch_stats": "batch_stats",
        "collections": "collections",
    }
    try:
        stored = arrays.metadata(folder)
        held = {name: stored[key] for name, key in saved_as.items() if stored.get(key) is not None}
        abstract = jax.tree.map(_on_host, held)
        leaves = named(_variables(abstract, average))
        forms = {name: (leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    except Exception as error:  # Orbax has no specific error for an invalid checkpoint
        raise CheckpointError(
            f"The checkpoint {folder} cannot be read: {error}. Pass another one."
        ) from error

    def read(names: Sequence[str]) -> dict[str, np.ndarray]:
        wanted = {saved_as[name]: tree for name, tree in abstract.items()}
        loaded = store.load(step, wanted)
        leaves = named(_variables({name: loaded[saved_as[name]] for name in abstract}, average))
        return {name: np.asarray(leaves[name]) for name in names}

    return WeightSource(str(folder), forms, read)


def _average_of(info: Mapping[str, Any], weights: str | None, folder: Path) -> str:
    """Returns the name of the average to read from a checkpoint; empty for the raw weights.

    Raises:
        CheckpointError: the checkpoint does not have these weights.
    """
    known = [RAW, *info.get(_AVERAGES, ())]
    name = info.get("judged", RAW) if weights is None else weights
    if name not in known:
        raise CheckpointError(
            f"The checkpoint {folder} does not have the weights {name!r}; it has "
            f"{', '.join(map(repr, known))}. Pass InitFrom(source, weights=...) with one of these."
        )
    return "" if name == RAW else name


def _variables(members: dict[str, PyTree], average: str) -> Variables:
    """Returns the arrays of a model from the members of a checkpoint."""

    def one(name: str, default: PyTree = None) -> PyTree:
        own = members.get(name, default)
        if not average:
            return own
        means = members[_AVERAGES][average]["values"][name]
        # What is not a float is not averaged.
        return jax.tree.map(
            lambda mean, leaf: leaf if mean is None else mean,
            means,
            own,
            is_leaf=lambda x: x is None,
        )

    return Variables(one("params", {}), one("batch_stats"), one("collections"))


def _on_host(leaf: Any) -> np.ndarray:
    """Returns a NumPy array without memory, so that the stored array is loaded to the host."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _native(dtype: Any) -> Any:
    """Returns a dtype in native byte order, which JAX needs."""
    return dtype.newbyteorder("=") if isinstance(dtype, np.dtype) else dtype


def is_random_key(leaf: Any) -> bool:
    """Returns whether a leaf is a typed random key, which is not a weight."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)

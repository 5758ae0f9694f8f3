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

from distaff import checkpoint
from distaff.checkpoint import arrays
from distaff.checkpoint.weights.names import named
from distaff.core import optional
from distaff.core.paths import as_path
from distaff.core.typing import PyTree
from distaff.errors import CheckpointError, ConfigError
from distaff.models import Variables

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


def open_source(source: Any) -> WeightSource:
    """Opens the source of an `InitFrom` without reading arrays.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: it is neither a path nor a tree of arrays.
        MissingExtraError: it is a safetensors file, and the package is not installed.
    """
    if not isinstance(source, str | os.PathLike):
        return _of_tree(source)
    path = as_path(source, "init_from")
    return _of_file(path) if path.suffix == SUFFIX else _of_checkpoint(path)


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


def _of_checkpoint(path: Path) -> WeightSource:
    store, step, folder = checkpoint.located(path)
    problem = store.check(step)  # first, because threads of Orbax outlive a failed read
    if problem is not None:
        raise CheckpointError(
            f"The checkpoint {folder} cannot be read: {problem}. Pass another one."
        )
    is_other = bool(store.info(step).get(EVALUATION_PARAMS))
    saved_as = {
        "params": EVALUATION_PARAMS if is_other else "params",
        "batch_stats": "batch_stats",
        "collections": "collections",
    }
    try:
        stored = arrays.metadata(folder)
        held = {name: stored[key] for name, key in saved_as.items() if stored.get(key) is not None}
        abstract = jax.tree.map(_on_host, held)
        forms = {
            name: (leaf.shape, leaf.dtype) for name, leaf in named(_variables(abstract)).items()
        }
    except Exception as error:  # Orbax has no specific error for an invalid checkpoint
        raise CheckpointError(
            f"The checkpoint {folder} cannot be read: {error}. Pass another one."
        ) from error

    def read(names: Sequence[str]) -> dict[str, np.ndarray]:
        wanted = {saved_as[name]: tree for name, tree in abstract.items()}
        loaded = store.load(step, wanted)
        leaves = named(_variables({name: loaded[saved_as[name]] for name in abstract}))
        return {name: np.asarray(leaves[name]) for name in names}

    return WeightSource(str(folder), forms, read)


def _variables(members: dict[str, PyTree]) -> Variables:
    return Variables(
        members.get("params", {}), members.get("batch_stats"), members.get("collections")
    )


def _on_host(leaf: Any) -> np.ndarray:
    """Returns a NumPy array without memory, so that the stored array is loaded to the host."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _native(dtype: Any) -> Any:
    """Returns a dtype in native byte order, which JAX needs."""
    return dtype.newbyteorder("=") if isinstance(dtype, np.dtype) else dtype


def is_random_key(leaf: Any) -> bool:
    """Returns whether a leaf is a typed random key, which is not a weight."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)

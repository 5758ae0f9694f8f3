"""Sources of weights: which arrays they have, before any of them is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
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
"""In a checkpoint, the parameters to evaluate with; no member of a state can have this name."""

SUFFIX = ".safetensors"

ShapeAndDtype: TypeAlias = tuple[tuple[int, ...], Any]
"""Shape and dtype."""


class WeightSource(NamedTuple):
    """Named arrays somewhere.

    Attributes:
        origin: what errors call it.
        forms: of each array by name, see `named`.
        read: returns the arrays of some names.
    """

    origin: str
    forms: dict[str, ShapeAndDtype]
    read: Callable[[Sequence[str]], dict[str, np.ndarray]]


def open_source(source: Any) -> WeightSource:
    """Looks at where weights come from; arrays are read later, those that fit.

    Args:
        source: see `InitFrom`.

    Raises:
        CheckpointError: there is nothing that can be read.
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
        raise ConfigError("init_from is a path or a tree of arrays; got a tree without any.")
    forms = {name: (tuple(leaf.shape), _native(leaf.dtype)) for name, leaf in leaves.items()}
    return WeightSource(
        "the tree", forms, lambda names: {name: np.asarray(leaves[name]) for name in names}
    )


def _of_file(path: Path) -> WeightSource:
    if not path.is_file():  # a pipe would be waited for
        raise CheckpointError(
            f"Weights are read from a regular file; {path} is none. Check the path."
        )
    library = optional.load("safetensors", extra="safetensors")
    return WeightSource(str(path), library.forms(path), partial(library.read, path))


def _of_checkpoint(path: Path) -> WeightSource:
    store, step, folder = checkpoint.located(path)
    problem = store.check(step)  # before Orbax reads it, whose threads outlive what they fail at
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
        abstract = jax.tree.map(_described, held)
        forms = {
            name: (leaf.shape, leaf.dtype) for name, leaf in named(_variables(abstract)).items()
        }
    except Exception as error:  # Orbax has no error of its own for what is no checkpoint
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


def _described(leaf: Any) -> np.ndarray:
    """Returns a NumPy array of a stored one's form, which takes no memory: it stays on the host."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _native(dtype: Any) -> Any:
    """Returns a dtype in this machine's order of bytes, in which all arrays of JAX are."""
    return dtype.newbyteorder("=") if isinstance(dtype, np.dtype) else dtype


def is_random_key(leaf: Any) -> bool:
    """Whether a leaf is a typed random key, which is no weight."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)

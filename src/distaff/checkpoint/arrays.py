"""The arrays of a checkpoint, as Orbax writes and reads them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.checkpoint.compare import first_difference, leaf_forms
from distaff.checkpoint.safe_path import safe
from distaff.core.quiet import quiet
from distaff.core.typing import PyTree
from distaff.errors import CheckpointError, leaf_name

_EMPTY = "$empty"
"""The entry beside the arrays that says which of them have no numbers, by name, and their shape."""


def import_early() -> None:
    """Imports Orbax in the background: it takes a third of what JAX does."""
    if "orbax.checkpoint" not in sys.modules:
        threading.Thread(target=_orbax, name="import orbax").start()


def as_array(path: tuple[Any, ...], leaf: Any) -> jax.Array | np.ndarray:
    """Returns a leaf as the array that it is saved as.

    Args:
        path: where it is in its tree.
        leaf: an array or a number.

    Raises:
        CheckpointError: it is neither.
    """
    if isinstance(leaf, jax.Array | np.ndarray):
        return leaf
    if isinstance(leaf, bool | int | float | complex | np.generic):
        return jnp.asarray(leaf)
    raise CheckpointError(
        f"Every leaf of a checkpoint is an array or a number; {leaf_name(path)!r} is a "
        f"{type(leaf).__name__}. Put it in `info`, as JSON, or leave it out."
    )


def write(path: Path, arrays: PyTree, info: Mapping[str, Any]) -> None:
    """Writes a folder that must not exist yet, in a directory that does.

    Args:
        path: the folder.
        arrays: on the host or on devices.
        info: strict JSON.
    """
    empty = {
        leaf_name(keys): list(np.shape(leaf))
        for keys, leaf in jax.tree.leaves_with_path(arrays)
        if np.size(leaf) == 0
    }
    kept = {_EMPTY: empty} if empty else {}
    with quiet(), safe(path) as place, _context():
        stored = jax.tree.map(_storable, arrays)
        _orbax().save(str(place), stored, custom_metadata={**info, **kept})


def read(path: Path, abstract: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Returns those arrays of a folder that `abstract` describes.

    Args:
        path: the folder.
        abstract: some of the outermost keys that were saved, with what describes the arrays.

    Raises:
        ValueError: the arrays are others; the first leaf that differs is named.
        Exception: whatever Orbax raises where it cannot read the folder.
    """
    target = jax.tree.map(_with_sharding, dict(abstract))
    stored = metadata(path)
    asked = {key: stored[key] for key in target if key in stored}
    # Compared first: what a folder declares is not allocated unless it is what is wanted.
    difference = first_difference(leaf_forms(asked), leaf_forms(target))
    if difference is not None:
        raise OtherModelError(difference)
    for keys, leaf in jax.tree.leaves_with_path(asked):
        if np.size(leaf):
            _check_chunks(leaf_name(keys), leaf)
    with quiet(), safe(path) as place, _context():
        loaded = _orbax().load(str(place), jax.tree.map(_storable, target))
    return jax.tree.map(_as_asked, loaded, target)


class OtherModelError(ValueError):
    """A checkpoint holds other arrays than those that are wanted."""


def metadata(path: Path) -> Mapping[str, PyTree]:
    """Returns what a folder says of its arrays.

    Args:
        path: the folder.

    Raises:
        ValueError: it does not describe a dict of arrays.
        Exception: whatever Orbax raises where it cannot read the folder.
    """
    with quiet(), safe(path) as place:
        described = _orbax().metadata(str(place))
    stored = described.metadata
    if not isinstance(stored, Mapping):
        raise ValueError(f"it holds no dict of arrays, but {type(stored).__name__}")
    empty = dict(described.custom_metadata or {}).get(_EMPTY)
    if isinstance(empty, Mapping):
        return jax.tree.map_with_path(lambda keys, leaf: _or_empty(keys, leaf, empty), stored)
    return stored


def damage(path: Path) -> str | None:
    """Returns what is wrong with what a folder says of its arrays, None where nothing is.

    Args:
        path: the folder.
    """
    try:
        metadata(path)
    except Exception as error:
        return str(error)
    return None


def _or_empty(keys: tuple[Any, ...], leaf: Any, empty: Mapping[str, Any]) -> Any:
    """Returns what a folder says of a leaf, or the shape of one without numbers."""
    shape = empty.get(leaf_name(keys))
    return leaf if shape is None else jax.ShapeDtypeStruct(tuple(map(int, shape)), leaf.dtype)


def _storable(leaf: Any) -> Any:
    """Returns a leaf, or one number in the place of an array without any, which Orbax refuses."""
    if np.size(leaf):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((1,), leaf.dtype, sharding=leaf.sharding)
    return np.zeros((1,), leaf.dtype)


def _as_asked(loaded: Any, target: Any) -> Any:
    if np.size(target):
        return loaded
    if isinstance(target, np.ndarray):
        return np.zeros(target.shape, target.dtype)
    return jax.device_put(np.zeros(target.shape, target.dtype), target.sharding)


def check_readable(path: Path, arrays: Mapping[str, PyTree]) -> None:
    """Reads back what was just written: the forms of all arrays, and the smallest member's values.

    Args:
        path: the folder.
        arrays: what was written.

    Raises:
        ValueError: something else is read.
        Exception: whatever Orbax raises where it cannot read the folder.
    """
    difference = first_difference(leaf_forms(metadata(path)), leaf_forms(arrays))
    if difference is not None:
        raise ValueError(f"what was written is not what is read. {difference}")
    sizes = {name: _num_bytes(tree) for name, tree in arrays.items()}
    for name in sorted((name for name in sizes if sizes[name]), key=sizes.__getitem__)[:1]:
        found = read(path, {name: arrays[name]})[name]
        same = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), found, arrays[name])
        if not jax.tree.all(same):
            raise ValueError(f"{name!r} is read with other values than were written")


def _num_bytes(tree: PyTree) -> int:
    """Returns the size of a tree on the host; 0 where a leaf is elsewhere."""
    leaves = jax.tree.leaves(tree)
    on_host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
    return sum(leaf.nbytes for leaf in leaves) if on_host else 0


def _check_chunks(name: str, leaf: Any) -> None:
    """Refuses an array whose pieces are larger than itself: each is decoded as a whole."""
    storage = getattr(leaf, "storage_metadata", None)
    chunks = getattr(storage, "chunk_shape", None) or ()
    if any(chunk > max(size, 1) for chunk, size in zip(chunks, leaf.shape, strict=True)):
        raise ValueError(
            f"the leaf {name!r} of shape {list(leaf.shape)} is stored in pieces of {list(chunks)}"
        )


def _with_sharding(leaf: Any) -> Any:
    """Returns what Orbax needs to place a leaf, whatever devices it was saved from."""
    if isinstance(leaf, np.ndarray):
        return leaf
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        leaf = jnp.asarray(leaf)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _orbax() -> Any:
    """Returns Orbax's API, which a run can begin without."""
    with quiet():
        from orbax.checkpoint import v1
    return v1


def _context() -> Any:
    context = _orbax().Context()
    # The keys that `abstract` leaves out stay on disk. What is missing, we have named before.
    context.pytree.loading.partial_load = True
    # In the background, a folder that cannot be made leaves Orbax's other threads waiting for it.
    context.asynchronous.create_directories_asynchronously = False
    return context

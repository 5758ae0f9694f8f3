"""Reads and writes the arrays of a checkpoint with Orbax."""

from __future__ import annotations

import contextlib
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
"""The metadata entry with the names and shapes of arrays of size 0, which Orbax cannot store."""


_LONGEST_SAVE = 3600
"""Seconds after which a save fails; a run reports a slow one before."""


def import_early() -> None:
    """Imports Orbax in the background: it takes a third of the time of JAX."""
    if "orbax.checkpoint" not in sys.modules:
        threading.Thread(target=_try_orbax, name="import orbax").start()


def as_array(path: tuple[Any, ...], leaf: Any) -> jax.Array | np.ndarray:
    """Returns a leaf, an array or a number, as an array.

    Raises:
        CheckpointError: it is neither.
    """
    if isinstance(leaf, jax.Array | np.ndarray):
        return leaf
    if isinstance(leaf, bool | int | float | complex | np.generic):
        return jnp.asarray(leaf)
    raise CheckpointError(
        f"Every leaf of a checkpoint must be an array or a number; {leaf_name(path)!r} is a "
        f"{type(leaf).__name__}. Move it to `info`, as JSON, or leave it out."
    )


def write(path: Path, arrays: PyTree, info: Mapping[str, Any]) -> None:
    """Writes arrays and `info`, strict JSON, to a new folder in an existing directory."""
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
    """Returns the arrays of a folder that `abstract` describes.

    Args:
        path: the folder.
        abstract: some of the outermost keys that were saved, with arrays or their descriptions.

    Raises:
        OtherModelError: the arrays differ; names the first leaf that differs.
        Exception: any exception of Orbax if it cannot read the folder.
    """
    target = jax.tree.map(_with_sharding, dict(abstract))
    stored = metadata(path)
    requested = {key: stored[key] for key in target if key in stored}
    # Compared first, so that no memory is allocated for arrays that a folder merely declares.
    difference = first_difference(leaf_forms(requested), leaf_forms(target))
    if difference is not None:
        raise OtherModelError(difference)
    for keys, leaf in jax.tree.leaves_with_path(requested):
        if np.size(leaf):
            _check_chunks(leaf_name(keys), leaf)
    with quiet(), safe(path) as place, _context():
        loaded = _orbax().load(str(place), jax.tree.map(_storable, target))
    return jax.tree.map(_with_empty, loaded, target)


class OtherModelError(ValueError):
    """The arrays of a checkpoint do not match the model."""


def metadata(path: Path) -> Mapping[str, PyTree]:
    """Returns the metadata of the arrays of a folder.

    Raises:
        ValueError: it does not describe a dict of arrays.
        Exception: any exception of Orbax if it cannot read the folder.
    """
    with quiet(), safe(path) as place:
        described = _orbax().metadata(str(place))
    stored = described.metadata
    if not isinstance(stored, Mapping):
        raise ValueError(f"it holds {type(stored).__name__} instead of a dict of arrays")
    empty = dict(described.custom_metadata or {}).get(_EMPTY)
    if isinstance(empty, Mapping):
        return jax.tree.map_with_path(lambda keys, leaf: _or_empty(keys, leaf, empty), stored)
    return stored


def damage(path: Path) -> str | None:
    """Returns what is wrong with the metadata of a folder's arrays; None if nothing is."""
    try:
        metadata(path)
    except Exception as error:
        return str(error)
    return None


def _or_empty(keys: tuple[Any, ...], leaf: Any, empty: Mapping[str, Any]) -> Any:
    """Returns the metadata of a leaf, or the shape of an empty one."""
    shape = empty.get(leaf_name(keys))
    return leaf if shape is None else jax.ShapeDtypeStruct(tuple(map(int, shape)), leaf.dtype)


def _storable(leaf: Any) -> Any:
    """Returns a leaf, or a placeholder of size 1 for an empty array, which Orbax cannot store."""
    if np.size(leaf):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((1,), leaf.dtype, sharding=leaf.sharding)
    return np.zeros((1,), leaf.dtype)


def _with_empty(loaded: Any, target: Any) -> Any:
    """Returns a loaded leaf, or an empty array if the target is empty."""
    if np.size(target):
        return loaded
    if isinstance(target, np.ndarray):
        return np.zeros(target.shape, target.dtype)
    return jax.device_put(np.zeros(target.shape, target.dtype), target.sharding)


def check_readable(path: Path, arrays: Mapping[str, PyTree]) -> None:
    """Reads back the metadata of all arrays, and the values of the smallest member.

    With several processes, each compares the parts on its own devices; all must call this.

    Args:
        path: the folder.
        arrays: the arrays that were written.

    Raises:
        ValueError: the folder holds something else.
        Exception: any exception of Orbax if it cannot read the folder.
    """
    difference = first_difference(leaf_forms(metadata(path)), leaf_forms(arrays))
    if difference is not None:
        raise ValueError(f"reading it back gives other arrays. {difference}")
    sizes = {name: _num_bytes(tree) for name, tree in arrays.items()}
    for name in sorted((name for name in sizes if sizes[name]), key=sizes.__getitem__)[:1]:
        found = read(path, {name: arrays[name]})[name]
        if not jax.tree.all(jax.tree.map(_are_same, found, arrays[name])):
            raise ValueError(f"reading {name!r} back gives other values")


def _num_bytes(tree: PyTree) -> int:
    """Returns the size of a tree; 0 if a leaf is a random key, or on a device of this process."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.nbytes for leaf in leaves) if all(map(_is_comparable, leaves)) else 0


def _is_comparable(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray):
        return True
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return not is_key and not leaf.is_fully_addressable  # such a snapshot is not on the host


def _are_same(found: Any, leaf: Any) -> bool:
    """Whether two arrays have the same bits, as far as they are on devices of this process."""
    if isinstance(leaf, np.ndarray):
        return found.tobytes() == leaf.tobytes()
    pairs = zip(found.addressable_shards, leaf.addressable_shards, strict=True)
    return all(np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes() for a, b in pairs)


def _check_chunks(name: str, leaf: Any) -> None:
    """Raises if the chunks of an array are larger than the array: each is decoded as a whole."""
    storage = getattr(leaf, "storage_metadata", None)
    chunks = getattr(storage, "chunk_shape", None) or ()
    if any(chunk > max(size, 1) for chunk, size in zip(chunks, leaf.shape, strict=True)):
        raise ValueError(
            f"the leaf {name!r} of shape {list(leaf.shape)} is stored in chunks of {list(chunks)}"
        )


def _with_sharding(leaf: Any) -> Any:
    """Returns a leaf with the sharding to load it with, whatever devices it was saved from."""
    if isinstance(leaf, np.ndarray):
        return leaf
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        leaf = jnp.asarray(leaf)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _try_orbax() -> None:
    """Imports Orbax unless that fails, as at the end of the process: its first use then raises."""
    with contextlib.suppress(Exception):
        _orbax()


def _orbax() -> Any:
    """Imports Orbax on first use."""
    with quiet():
        from orbax.checkpoint import v1
    return v1


def _context() -> Any:
    context = _orbax().Context()
    # Keys that are not in `abstract` stay on disk. `read` has checked for missing ones.
    context.pytree.loading.partial_load = True
    # If a folder cannot be created in the background, Orbax's other threads wait for it forever.
    context.asynchronous.create_directories_asynchronously = False
    context.asynchronous.timeout_secs = _LONGEST_SAVE
    return context

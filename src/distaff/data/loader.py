"""The Loader protocol, and functions of loaders and batches."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np

from distaff.core.config.checks import whole
from distaff.core.typing import Batch
from distaff.data.adapters.adapters import adapted
from distaff.data.entry import register_dataclasses
from distaff.data.stream import Stream
from distaff.errors import BatchError, ConfigError, leaf_name, nearest

_NOT_NUMBERS = "OSUTMm"
_ENCODE = "Encode it as numbers, or drop it."
_PAD = "Pad all examples to one shape, and yield a mask of the real entries with them."


@runtime_checkable
class Loader(Protocol):
    """Yields batches, epoch by epoch, and saves and restores its position.

    A batch is any pytree of arrays with one leading axis: `[batch, ...]`. Each batch consists of
    fresh arrays, never of a reused buffer. Only one iteration runs at a time.

    Optional members: `__len__`, the number of batches in an epoch; `num_shapes`, the number of
    distinct shapes of its batches; `peek()`, which returns the next batch without consuming it;
    `abandon()`, after which the next `iter()` begins a new epoch; and `close_made()`, which closes
    loaders that it made itself, and returns whether there were any; and `has_one_order`, whether
    equal loaders in several processes read the same batches in the same order. A wrapper has its
    inner loaders in an attribute: `loader`, or a tuple `loaders`.

    `in_order()` returns a loader for evaluation, or None, and does not move this one. Each
    iteration of it yields every example exactly once, in the order of the data.
    """

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches of the next epoch, or after `set_state` the rest of that epoch.

        An epoch without batches does not change the state.
        """
        ...

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last yielded batch, to be stored in a checkpoint.

        Its values must survive JSON unchanged: integers, strings, lists and dicts.
        """
        ...

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores a position: the next `iter()` yields exactly the rest of that epoch.

        The rest is empty if the last batch of the epoch had been yielded.

        Raises:
            ChangedBatchesError: the batches up to the position differ from before.
        """
        ...


def as_loader(data: Any, *, name: str = "data") -> Loader:
    """Returns a loader unchanged, adapts loaders of other libraries, wraps iterables in a `Stream`.

    Loaders of Grain, PyTorch and TensorFlow are supported; see `distaff.data.adapters`.

    Args:
        data: a loader, an iterable of batches, or a function that returns one.
        name: name of the loader for the error, such as `"train"`.

    Raises:
        BatchError: the value is not an iterable of batches, but for example the arrays themselves.
    """
    known = adapted(data)
    if known is not None:
        return known
    if isinstance(data, Loader):
        return data
    are_arrays = isinstance(data, tuple) and data and all(hasattr(each, "shape") for each in data)
    if hasattr(data, "shape") or isinstance(data, Mapping) or are_arrays:
        raise BatchError(
            f"The {name} loader must yield batches; got {type(data).__name__}, which looks like "
            f"the whole dataset. Write data.ArrayLoader({name}, batch_size=...)."
        )
    if isinstance(data, str | bytes) or not (isinstance(data, Iterable) or callable(data)):
        raise BatchError(
            f"The {name} loader must be an iterable of batches; got {type(data).__name__}. "
            "Write data.ArrayLoader(arrays, batch_size=...) for arrays in memory."
        )
    return Stream(data)


def inner_loaders(loader: Any) -> tuple[Any, ...]:
    """Returns the loaders that a wrapper reads: its tuple `loaders`, or its `loader` or None."""
    inner = getattr(loader, "loaders", None)
    return inner if isinstance(inner, tuple) else (getattr(loader, "loader", None),)


def sources(loader: Any) -> Iterator[Any]:
    """Yields the innermost loaders of a loader: the loader itself if it wraps none."""
    inner = inner_loaders(loader)
    if not all(isinstance(each, Loader) for each in inner):
        yield loader
        return
    for each in inner:
        yield from sources(each)


def has_one_order(loader: Any) -> bool:
    """Whether equal loaders in several processes read the same batches in the same order.

    This is the loader's attribute `has_one_order`, False without it.
    """
    return bool(getattr(loader, "has_one_order", False))


def close_made(loader: Any) -> bool:
    """Closes the loaders that a loader made itself; returns whether there were any."""
    close = getattr(loader, "close_made", None)
    return close is not None and bool(close())


@contextmanager
def closing_made(*pairs: tuple[Any, Any]) -> Generator[None]:
    """Closes, at exit, the loaders made from a user's data, and by a user's loaders.

    Args:
        *pairs: the user's data, and the loader made from it.
    """
    try:
        yield
    finally:
        for data, loader in pairs:
            if loader is not data and hasattr(loader, "close"):
                loader.close()
            close_made(data)


def in_order(loader: Any) -> Any:
    """Returns `loader.in_order()`, a loader for evaluation; None if the loader has none."""
    make = getattr(loader, "in_order", None)
    return None if make is None else make()


def abandon(loader: Loader) -> None:
    """Abandons the epoch that `set_state` restored: the next `iter()` begins a new one."""
    leave = getattr(loader, "abandon", None)
    if leave is None:
        next(iter(loader), None)
    else:
        leave()


def begin_new_epoch(loader: Loader) -> None:
    """Abandons the current epoch of a loader at any position."""
    loader.set_state(loader.get_state())
    abandon(loader)


def num_batches(loader: Loader) -> int | None:
    """Returns the number of batches in an epoch, or None if it is unknown."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:
        return None


def num_shapes(loader: Any) -> int:
    """Returns the number of distinct shapes of a loader's batches, ignoring short last batches.

    This is the loader's attribute `num_shapes`, or that of its inner `loader`, or 1.
    """
    own = getattr(loader, "num_shapes", None)
    inner = getattr(loader, "loader", None)
    if own is not None:
        return own
    return 1 if inner is None else num_shapes(inner)


def num_examples(batch: Batch, *, name: str = "") -> int:
    """Returns the length of the leading axis that all leaves of a batch share.

    Only `shape` and `dtype` are read, so NumPy and JAX arrays, tracers and `jax.ShapeDtypeStruct`
    all work. If the leaves differ in their leading axis, as for a batch of graphs, the class of the
    batch defines a property `num_examples`.

    Args:
        batch: a pytree of arrays `[batch, ...]`.
        name: name of the batch's loader for the error, such as `"train"`.

    Raises:
        BatchError: the batch has no leaves or no examples, or a leaf is not a numeric array, has
            no axis, or differs in length.

    >>> num_examples({"image": np.zeros((32, 8, 8, 1)), "label": np.zeros(32)})
    32
    """
    leaves = jax.tree_util.tree_leaves_with_path(register_dataclasses(batch))
    whose = f"a batch of the {name} loader" if name else "a batch"
    if not leaves:
        raise BatchError(
            f"{whose.capitalize()} must hold at least one array [batch, ...]; got "
            f"{type(batch).__name__} without leaves. Yield, for example, {{'image': images, "
            "'label': labels}."
        )
    own = counts_itself(batch)
    shapes = {
        (name := leaf_name(path)): array_shape(name, leaf, whose, has_axis=not own)
        for path, leaf in leaves
    }
    if own:
        return whole(f"num_examples of {whose}", batch.num_examples)
    first, *others = shapes
    for other in others:
        if shapes[other][0] != shapes[first][0]:
            raise BatchError(
                f"All leaves of {whose} must have the same leading length; "
                f"{other!r} has shape {shapes[other]}, {first!r} has shape {shapes[first]}. "
                "Yield one row per example in every leaf. For examples of several rows, such as "
                "graphs, make the batch a dataclass with a property num_examples."
            )
    if shapes[first][0] == 0:
        raise BatchError(
            f"{whose.capitalize()} must hold at least one example; {first!r} has shape "
            f"{shapes[first]}. Skip empty batches."
        )
    return shapes[first][0]


def counts_itself(batch: Batch) -> bool:
    """Whether a batch has a property `num_examples`; its leaves may then have any shapes."""
    return not hasattr(batch, "shape") and hasattr(batch, "num_examples")


def drops_remainder(remainder: Literal["keep", "drop"] | None, shuffle: bool) -> bool:
    """Returns whether to drop a short last batch; by default only when shuffling."""
    if remainder not in ("keep", "drop", None):
        raise ConfigError(
            f"Unknown remainder {remainder!r}. {nearest(remainder, ('keep', 'drop'))}"
        )
    return bool(shuffle) if remainder is None else remainder == "drop"


def epoch_length(count: int, batch_size: int, *, drop: bool) -> int:
    """Returns the number of batches of `count` examples, with or without a short last batch.

    Raises:
        BatchError: it is 0.
    """
    length, rest = divmod(count, batch_size)
    length += rest > 0 and not drop
    if not length:
        dropped = ", and short batches are dropped" if drop else ""
        raise BatchError(
            f"The data must fill at least one batch; they hold {count} examples, batch_size is "
            f"{batch_size}{dropped}. Pass more examples, lower batch_size, or keep the short batch "
            "with remainder='keep'."
        )
    return length


def canonicalize(tree: Any) -> Any:
    """Applies `canonicalize_leaf` to each leaf of a tree."""
    return jax.tree.map_with_path(lambda path, leaf: canonicalize_leaf(leaf, path), tree)


def canonicalize_leaf(leaf: Any, path: tuple[Any, ...] = ()) -> np.ndarray:
    """Casts an array to JAX's dtype for it: 32 bits instead of 64, unless `jax_enable_x64` is set.

    Raises:
        BatchError: an integer does not fit into 32 bits; the message names its `path`.
    """
    array = np.asarray(leaf)
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    if dtype != array.dtype and dtype.kind in "iu" and array.size:
        limits, low, high = np.iinfo(dtype), array.min(), array.max()
        if low < limits.min or high > limits.max:
            raise BatchError(
                f"Integers must fit into {dtype}, the dtype that JAX uses; {leaf_name(path)!r} has "
                f"values from {low} to {high}. Number them from 0 (np.unique with return_inverse), "
                "drop them, or set jax_enable_x64."
            )
    return array.astype(dtype, copy=False)


def first_batch(loader: Loader, *, name: str = "data") -> Batch:
    """Returns the next batch without consuming it.

    Args:
        loader: the loader.
        name: name of the loader for the error, such as `"train"`.

    Raises:
        BatchError: the loader is empty, or `num_examples` does not accept the batch.
    """
    peek = getattr(loader, "peek", None)
    batch = peek() if peek else _peek_and_restore(loader)
    if batch is None:
        raise empty_loader(name)
    num_examples(batch, name="" if name == "data" else name)
    return batch


def epoch_of(
    loader: Loader, steps_per_epoch: int | None = None, *, name: str = "data", repeat: bool = True
) -> Iterator[Batch]:
    """Yields the batches of one epoch.

    Args:
        loader: source of the batches.
        steps_per_epoch: number of batches, such as for an endless stream. An epoch continues where
            the last one stopped, and starts the loader again when it runs out. None for one pass
            over the loader.
        name: name of the loader for the error, such as `"train"`.
        repeat: whether the loader may have fewer batches than `steps_per_epoch`.

    Raises:
        BatchError: the loader is empty; or one pass has too few batches, without `repeat`.
        ConfigError: `steps_per_epoch` is less than 1.
    """
    if steps_per_epoch is not None:
        if steps_per_epoch < 1:
            raise ConfigError(f"steps_per_epoch must be at least 1; got {steps_per_epoch}.")
        loader.set_state(loader.get_state())
    missing = steps_per_epoch
    while missing != 0:
        before, taken = loader.get_state(), 0
        is_whole = missing != steps_per_epoch or before.get("batch") == 0
        for batch in islice(loader, missing):
            taken += 1
            yield batch
        # The rest of a resumed epoch may be empty; the loader has then moved to the next one.
        if not taken and loader.get_state() == before:
            raise empty_loader(name)
        missing = 0 if missing is None else missing - taken
        if missing and is_whole and not repeat:
            raise BatchError(
                f"The {name} loader ran out after {taken} batches, and steps_per_epoch="
                f"{steps_per_epoch}. Lower it, yield more batches, or pass repeat=True to "
                "train_model: the loader then starts again within an epoch."
            )


def _peek_and_restore(loader: Loader) -> Batch | None:
    state = loader.get_state()
    batch = next(iter(loader), None)
    if batch is None:  # nothing is left of a resumed epoch
        batch = next(iter(loader), None)
    loader.set_state(state)
    return batch


def array_shape(name: str, leaf: Any, whose: str, *, has_axis: bool = True) -> tuple[int, ...]:
    """Returns the shape of a leaf `name` of a batch, `whose`, after checking that it is numeric.

    Raises:
        BatchError: it is not a numeric array, or has no axis although `has_axis`.
    """
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        is_text = isinstance(leaf, str | bytes)
        remedy = _ENCODE if is_text else "Put the values of all examples into numpy.asarray([...])."
        raise BatchError(
            f"All leaves of {whose} must be arrays [batch, ...]; {name!r} is of type "
            f"{type(leaf).__name__}. {remedy}"
        )
    if isinstance(leaf.dtype, np.dtype) and leaf.dtype.kind in _NOT_NUMBERS:
        is_ragged = leaf.dtype.hasobject and any(np.ndim(each) for each in leaf.flat)
        held = " and holds arrays of several shapes" if is_ragged else ""
        raise BatchError(
            f"All leaves of {whose} must hold numbers; {name!r} has dtype {leaf.dtype}{held}. "
            f"{_PAD if is_ragged else _ENCODE}"
        )
    if has_axis and not leaf.shape:
        raise BatchError(
            f"All leaves of {whose} must have a leading axis [batch, ...]; {name!r} is a scalar. "
            "Put the values of all examples into one array, or drop it."
        )
    return tuple(leaf.shape)


def empty_loader(name: str) -> BatchError:
    """Returns the error for a loader without batches."""
    return BatchError(
        f"The {name} loader must yield at least one batch in an epoch; it yields none. "
        "Check its source, its filters, and whether an iterator was already used up."
    )

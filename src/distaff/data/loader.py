"""The Loader protocol, and the few questions that are asked of every loader and batch."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np

from distaff.core.config.checks import whole
from distaff.core.typing import Batch
from distaff.data.adapters.adapters import adapted
from distaff.data.dataclass_batches import known_to_jax
from distaff.data.stream import Stream
from distaff.errors import BatchError, ConfigError, leaf_name, nearest

_NOT_NUMBERS = "OSUTMm"
_ENCODE = "Encode it as numbers, or leave it out."
_PAD = "Pad all examples to one shape, and yield a mask of what is real beside them."


W = TypeVar("W")


@runtime_checkable
class Loader(Protocol):
    """Yields batches, epoch by epoch, and knows its position.

    A batch is any pytree of arrays with one leading axis: `[batch, ...]`. Each batch is made of
    fresh arrays, never of a buffer that is filled again. One iteration runs at a time.

    A loader may also have `__len__`, the number of batches in an epoch; `num_shapes`, how many
    shapes its batches have; `peek()`, which returns the first batch to come without handing it out;
    `abandon()`, after which the next `iter()` begins a new epoch; and `close_made()`, which closes
    what it has made itself, and tells whether that was anything. One that takes its batches from
    others has these in an attribute: `loader`, or a tuple `loaders`.

    `in_order()` returns a loader to evaluate on, which moves nothing of this one: each iteration
    yields every example once, in the data's own order, none left out; or None where there is none.
    """

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches of the next epoch, or after `set_state` the rest of that epoch.

        An epoch without batches leaves the state as it is.
        """
        ...

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last batch that was handed out.

        Its values are those that JSON has, and come back from it as they are: whole numbers,
        texts, lists and dicts. A checkpoint holds it.
        """
        ...

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position: the next `iter()` yields exactly what was left of that epoch.

        That may be nothing, where the last batch of the epoch had been handed out.

        Raises:
            ChangedBatchesError: the batches up to the position are not those of before.
        """
        ...


def as_loader(data: Any, *, name: str = "data") -> Loader:
    """Returns a loader as it is, data of other libraries adapted, other iterables as a `Stream`.

    What Grain, PyTorch and TensorFlow yield batches with is known; see `distaff.data.adapters`.

    Args:
        data: a loader, an iterable of batches, or a function that returns one.
        name: what the error calls it, such as `"train"`.

    Returns:
        The loader.

    Raises:
        BatchError: the value is no iterable of batches, for example the arrays themselves.
    """
    known = adapted(data)
    if known is not None:
        return known
    if isinstance(data, Loader):
        return data
    arrays_in_a_tuple = isinstance(data, tuple) and {hasattr(item, "shape") for item in data} == {
        True
    }
    if hasattr(data, "shape") or isinstance(data, Mapping) or arrays_in_a_tuple:
        raise BatchError(
            f"The {name} loader must yield batches; got {type(data).__name__}, which looks like "
            f"the whole data set. Write data.ArrayLoader({name}, batch_size=...)."
        )
    if isinstance(data, str | bytes) or not (isinstance(data, Iterable) or callable(data)):
        raise BatchError(
            f"The {name} loader must be an iterable of batches; got {type(data).__name__}. "
            "Write data.ArrayLoader(arrays, batch_size=...) for arrays in memory."
        )
    return Stream(data)


def sources(loader: Any) -> Iterator[Any]:
    """Yields the loaders that the batches come from in the end: itself, where it wraps none.

    Args:
        loader: with its inner ones in the attribute `loader`, or a tuple `loaders`.
    """
    inner = getattr(loader, "loaders", None)
    inner = inner if isinstance(inner, tuple) else (getattr(loader, "loader", None),)
    if not all(isinstance(each, Loader) for each in inner):
        yield loader
        return
    for each in inner:
        yield from sources(each)


def close_made(loader: Any) -> bool:
    """Closes what a loader has made itself, if it can; returns whether that was anything."""
    close = getattr(loader, "close_made", None)
    return close is not None and bool(close())


@contextmanager
def closing_made(*pairs: tuple[Any, Any]) -> Generator[None]:
    """Closes in the end the loaders that were made of something else, so that nothing runs on.

    Those that a given loader has made are among them.

    Args:
        *pairs: what was given, and the loader it became.
    """
    try:
        yield
    finally:
        for given, made in pairs:
            if made is not given and hasattr(made, "close"):
                made.close()
            close_made(given)


def in_order(loader: Any) -> Any:
    """Returns a loader of the same examples that moves nothing of it; see `Loader`.

    Returns:
        None where the loader has none.
    """
    make = getattr(loader, "in_order", None)
    return None if make is None else make()


def over(wrapper: W, loader: Any) -> W | None:
    """Returns a wrapper of a loader over another loader; None without one."""
    if loader is None:
        return None
    copied: Any = copy.copy(wrapper)
    copied.loader = loader
    return copied


def abandon(loader: Loader) -> None:
    """Leaves the epoch that `set_state` put a loader into: the next `iter()` begins a new one."""
    leave = getattr(loader, "abandon", None)
    if leave is None:
        next(iter(loader), None)
    else:
        leave()


def num_batches(loader: Loader) -> int | None:
    """Returns the number of batches in an epoch, or None where the loader does not know it."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:
        return None


def num_shapes(loader: Any) -> int:
    """Returns how many shapes the batches of a loader have, but for those of short last batches.

    A loader may say so in its attribute `num_shapes`; or it has an attribute `loader`, whose
    batches it hands out. Others have one.
    """
    own = getattr(loader, "num_shapes", None)
    inner = getattr(loader, "loader", None)
    if own is not None:
        return own
    return 1 if inner is None else num_shapes(inner)


def num_examples(batch: Batch, *, name: str = "") -> int:
    """Returns the length of the leading axis that all leaves of a batch share.

    Only `shape` and `dtype` are read: NumPy and JAX arrays, tracers and
    `jax.ShapeDtypeStruct` will do. A batch of graphs, whose leaves differ in their leading axis,
    says what an example is: its class has a property `num_examples`.

    Args:
        batch: a pytree of arrays `[batch, ...]`.
        name: of the loader that it comes from, such as `"train"`, for the error.

    Returns:
        The number of examples.

    Raises:
        BatchError: there is no leaf or no example, or a leaf that is not an array of numbers, has
            no axis, or has another length.

    >>> num_examples({"image": np.zeros((32, 8, 8, 1)), "label": np.zeros(32)})
    32
    """
    leaves = jax.tree_util.tree_leaves_with_path(known_to_jax(batch))
    whose = f"a batch of the {name} loader" if name else "a batch"
    if not leaves:
        raise BatchError(
            f"{whose.capitalize()} must hold at least one array [batch, ...]; got "
            f"{type(batch).__name__} without leaves. Yield for example {{'image': images, 'label': "
            "labels}."
        )
    own = counts_itself(batch)
    shapes = {
        (name := leaf_name(path)): _array_shape(name, leaf, whose, has_axis=not own)
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
            f"{shapes[first]}. Leave empty batches out."
        )
    return shapes[first][0]


def counts_itself(batch: Batch) -> bool:
    """Whether a batch says itself how many examples it has; its leaves may then have any shapes."""
    return not hasattr(batch, "shape") and hasattr(batch, "num_examples")


def drops(remainder: Literal["keep", "drop"] | None, shuffle: bool) -> bool:
    """Returns whether a short last batch is left out; by default where the order is shuffled.

    Raises:
        ConfigError: `remainder` is neither.
    """
    if remainder not in ("keep", "drop", None):
        raise ConfigError(
            f"Unknown remainder {remainder!r}. {nearest(remainder, ('keep', 'drop'))}"
        )
    return bool(shuffle) if remainder is None else remainder == "drop"


def held_by_jax(tree: Any) -> Any:
    """Returns a tree with each leaf as `as_held_by_jax` has it."""
    return jax.tree.map_with_path(lambda path, leaf: as_held_by_jax(leaf, path), tree)


def as_held_by_jax(leaf: Any, path: tuple[Any, ...] = ()) -> np.ndarray:
    """Returns an array in the dtype that JAX would hold it in: 32 bits for 64, as it is set.

    Args:
        leaf: what becomes an array.
        path: where it stands in its tree, for the error.

    Raises:
        BatchError: an integer does not fit.
    """
    array = np.asarray(leaf)
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    if dtype != array.dtype and dtype.kind in "iu" and array.size:
        limits, low, high = np.iinfo(dtype), array.min(), array.max()
        if low < limits.min or high > limits.max:
            raise BatchError(
                f"Integers must fit into {dtype}, in which JAX holds them; {leaf_name(path)!r} has "
                f"values from {low} to {high}. Number them from 0 (np.unique with return_inverse), "
                "leave them out, or set jax_enable_x64."
            )
    return array.astype(dtype, copy=False)


def first_batch(loader: Loader, *, name: str = "data") -> Batch:
    """Returns the first batch to come; the loader stays where it is.

    Args:
        loader: the loader to look into.
        name: what the error calls it, such as `"train"`.

    Returns:
        The batch.

    Raises:
        BatchError: the loader is empty, or the batch is none that `num_examples` accepts.
    """
    peek = getattr(loader, "peek", None)
    batch = peek() if peek else _peek_and_return(loader)
    if batch is None:
        raise _empty(name)
    num_examples(batch, name="" if name == "data" else name)
    return batch


def epoch_of(
    loader: Loader,
    steps_per_epoch: int | None = None,
    *,
    name: str = "data",
    repeat: bool = True,
) -> Iterator[Batch]:
    """Yields the batches of one epoch.

    Args:
        loader: where they come from.
        steps_per_epoch: exactly this many batches, which go on where the last ones stopped, and
            start again where the loader runs out: a cut for infinite streams. None: what the
            loader calls an epoch.
        name: what the error calls the loader, such as `"train"`.
        repeat: whether a loader may have fewer batches than `steps_per_epoch`.

    Yields:
        Batches.

    Raises:
        BatchError: the loader is empty; or a whole pass has too few batches, without `repeat`.
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
        # What is left of a resumed epoch may be empty; then the loader has moved on.
        if not taken and loader.get_state() == before:
            raise _empty(name)
        missing = 0 if missing is None else missing - taken
        if missing and is_whole and not repeat:
            raise BatchError(
                f"The {name} loader ran out after {taken} batches, and steps_per_epoch="
                f"{steps_per_epoch}. Lower it, give more batches, or pass repeat=True to "
                "train_model: the loader then starts again within an epoch."
            )


def _peek_and_return(loader: Loader) -> Batch | None:
    state = loader.get_state()
    batch = next(iter(loader), None)
    if batch is None:
        # A resumed epoch may have nothing left: look into the one after it.
        batch = next(iter(loader), None)
    loader.set_state(state)
    return batch


def _array_shape(name: str, leaf: Any, whose: str, *, has_axis: bool = True) -> tuple[int, ...]:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        is_text = isinstance(leaf, str | bytes)
        remedy = _ENCODE if is_text else "Write numpy.asarray([...]) around all examples' values."
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
            "Put the values of all examples into one array, or leave it out."
        )
    return tuple(leaf.shape)


def _empty(name: str) -> BatchError:
    return BatchError(
        f"The {name} loader must yield at least one batch in an epoch; it yields none. "
        "Check its source, its filters, and whether an iterator was already used up."
    )

"""Adapts PyTorch's data loaders: tensors become NumPy arrays, in the same structure."""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.typing import Batch
from distaff.core.warnings import warn
from distaff.data.positioned import Positioned
from distaff.data.stream import Stream

_ARRAY, _BYTES, _TUPLE = "$array", "$bytes", "$tuple"


def torch_loader(loader: Any) -> Any:
    """Returns a loader over a `torch.utils.data.DataLoader`, with its workers and collation.

    A data loader with `state_dict` and `load_state_dict`, such as torchdata's `StatefulDataLoader`,
    restores positions itself. Any other becomes a `Stream`, which reads it again up to the
    position, and verifies the batches: to shuffle, give it a seeded `generator`.
    """
    if hasattr(loader, "get_state") and hasattr(loader, "set_state"):
        return loader
    try:
        length = len(loader)
    except TypeError:
        length = None

    def in_order() -> Stream:
        view = _in_order(loader)
        if view is not None:
            return Stream(_TorchBatches(view), length=None if length is None else len(view))
        warn(
            "This evaluation uses the examples that the DataLoader's sampler draws, since Distaff "
            "cannot iterate in order over the sampler "
            f"{type(loader.sampler).__name__} or its batch_sampler. "
            "To evaluate every example once, pass a DataLoader(dataset, batch_size) without "
            "shuffling.",
            stacklevel=2,
        )
        return Stream(_Unmoved(loader), length=length)

    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        return Positioned(_Stateful(loader), length=length, in_order=in_order)
    return Stream(_TorchBatches(loader), length=length, in_order=in_order)


def as_arrays(batch: Any) -> Batch:
    """Returns a batch with its tensors as NumPy arrays, which share memory if possible."""
    return jax.tree.map(lambda leaf: _as_array(leaf) if _is_tensor(leaf) else leaf, batch)


class _TorchBatches:
    """The batches of a data loader, as an iterable."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        return map(as_arrays, iter(self._loader))


class _Unmoved(_TorchBatches):
    """The batches of a data loader; restores the state of its generator afterwards."""

    def __iter__(self) -> Iterator[Batch]:
        generator = self._loader.generator
        state = None if generator is None else generator.get_state()
        try:
            yield from super().__iter__()
        finally:
            if generator is not None:
                generator.set_state(state)


def _in_order(loader: Any) -> Any:
    """Returns a data loader that yields each example once, in order, or None if impossible.

    It has its own generator, so that it does not advance the original one.
    """
    torch: Any = sys.modules["torch"]
    utils, sampler = torch.utils.data, loader.sampler
    whole = isinstance(loader.dataset, utils.IterableDataset)
    whole |= _is_torchs(sampler, "SequentialSampler", "RandomSampler")
    whole &= not getattr(sampler, "replacement", False)
    whole &= getattr(sampler, "_num_samples", None) is None
    indices = getattr(sampler, "indices", None)
    is_part = _is_torchs(sampler, "SubsetRandomSampler") and indices is not None
    batches = loader.batch_sampler
    is_known = _is_torchs(loader, "DataLoader", "StatefulDataLoader")
    is_known &= batches is None or _is_torchs(batches, "BatchSampler")
    if not is_known or not (whole or is_part):
        return None
    return utils.DataLoader(
        loader.dataset,
        loader.batch_size,
        sampler=[int(index) for index in indices] if is_part else None,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        timeout=loader.timeout,
        generator=torch.Generator(),
    )


def _is_torchs(value: Any, *names: str) -> bool:
    """Whether the class of an object is defined in torch or torchdata, and is not a subclass."""
    package = type(value).__module__.split(".")[0]
    return package in ("torch", "torchdata") and type(value).__name__ in names


class _Stateful:
    """A data loader that saves and restores its position."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def start(self, epoch: int, batch: int, saved: Any) -> Iterator[Batch]:
        # Also at the start of an epoch: its order depends on the generator after the last one.
        if saved is not None:
            self._loader.load_state_dict(_from_json(saved))
        # The loader does not reuse the memory of its batches, so no copy is needed.
        return map(as_arrays, iter(self._loader))

    def position(self) -> Any:
        return _to_json(self._loader.state_dict())


def _is_tensor(value: Any) -> bool:
    return any(
        base.__module__ == "torch" and base.__name__ == "Tensor" for base in type(value).__mro__
    )


def _as_array(tensor: Any) -> np.ndarray:
    tensor = tensor.detach().cpu()
    try:
        return tensor.numpy()
    except TypeError:  # NumPy has no bfloat16; float32 represents its values exactly
        return tensor.float().numpy().astype(jnp.bfloat16)


def _to_json(value: Any) -> Any:
    """Converts a state of dicts, lists, numbers, tensors, arrays and bytes to JSON values."""
    if isinstance(value, Mapping):
        return {"": [[_to_json(name), _to_json(each)] for name, each in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [_to_json(each) for each in value]}
    if isinstance(value, list):
        return [_to_json(each) for each in value]
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    if _is_tensor(value) or isinstance(value, np.ndarray | np.generic):
        array = np.asarray(_as_array(value) if _is_tensor(value) else value)
        data = base64.b64encode(array.tobytes()).decode()
        return {_ARRAY: [array.dtype.str, list(array.shape), data, _is_tensor(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"A data loader's state may hold numbers, strings, arrays, lists and dicts; got {value!r}"
    )


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    ((kind, held),) = value.items()
    if kind == _TUPLE:
        return tuple(_from_json(each) for each in held)
    if kind == _BYTES:
        return base64.b64decode(held, validate=True)
    if kind == _ARRAY:
        dtype, shape, data, is_tensor = held
        found = np.dtype(dtype)
        if found.hasobject:
            raise ValueError(f"an array in a position has dtype {dtype!r}")
        array = np.frombuffer(base64.b64decode(data, validate=True), found).reshape(shape).copy()
        return sys.modules["torch"].from_numpy(array) if is_tensor else array
    return {_from_json(name): _from_json(each) for name, each in held}

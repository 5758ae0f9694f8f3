"""PyTorch's data loaders as loaders: tensors become NumPy arrays, in the structure they come in."""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.data.positioned import Positioned
from distaff.data.stream import Stream
from distaff.typing import Batch

_ARRAY, _BYTES, _TUPLE = "$array", "$bytes", "$tuple"


def torch_loader(loader: Any) -> Any:
    """Returns a loader over a `torch.utils.data.DataLoader`; its workers and collation are kept.

    One with `state_dict` and `load_state_dict`, as torchdata's `StatefulDataLoader` has them, goes
    to a position by itself. Any other one is read again up to it, as a `Stream`, which verifies
    that it yields the same batches: give one that shuffles a seeded `generator`.

    Args:
        loader: the data loader; one that is a `Loader` already is returned as it is.
    """
    if hasattr(loader, "get_state") and hasattr(loader, "set_state"):
        return loader
    try:
        length = len(loader)
    except TypeError:
        length = None
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        return Positioned(_Stateful(loader), length=length)
    return Stream(_Batches(loader), length=length)


def as_arrays(batch: Any) -> Batch:
    """Returns a batch whose tensors are NumPy arrays over the same memory, where NumPy can."""
    return jax.tree.map(lambda leaf: _as_array(leaf) if _is_tensor(leaf) else leaf, batch)


class _Batches:
    """The batches of a data loader, which is iterated anew in each epoch."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        return map(as_arrays, iter(self._loader))


class _Stateful:
    """A data loader that knows its position."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def start(self, epoch: int, batch: int, saved: Any) -> Iterator[Batch]:
        # At the start of an epoch, too: an order is drawn from where the last one has left off.
        if saved is not None:
            self._loader.load_state_dict(_from_json(saved))
        # A map goes on with what is handed out: arrays own no memory that the loader fills again.
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
    except TypeError:  # bfloat16, which NumPy does not have: float32 holds its values exactly
        return tensor.float().numpy().astype(jnp.bfloat16)


def _to_json(value: Any) -> Any:
    """Returns a state of dicts, lists, numbers, tensors, arrays and bytes as JSON has it."""
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
        f"A data loader's state holds numbers, texts, arrays, lists and dicts; found {value!r}"
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

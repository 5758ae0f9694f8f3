"""Adapts data of other libraries to loaders, without importing these libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from distaff.core import optional
from distaff.data.adapters.tensorflow import tensorflow_loader
from distaff.data.adapters.torch import torch_loader
from distaff.errors import BatchError


class LoaderKind(NamedTuple):
    """The package and the name of a class of data, and a function that makes a loader of it."""

    package: str
    name: str
    adapt: Callable[[Any], Any]


def _grain_loader(data: Any) -> Any:
    return optional.load("grain", extra="grain").make_loader(data)


def _raise_for_rows(data: Any) -> NoReturn:
    raise BatchError(
        f"A loader must yield batches; a Hugging Face {type(data).__name__} holds rows. Write "
        "data.from_datasets(dataset, batch_size=..., shuffle=True)."
    )


KINDS = (
    LoaderKind("grain", "MapDataset", _grain_loader),
    LoaderKind("grain", "IterDataset", _grain_loader),
    LoaderKind("grain", "DataLoader", _grain_loader),
    LoaderKind("grain", "DatasetIterator", _grain_loader),
    LoaderKind("grain", "DataLoaderIterator", _grain_loader),
    LoaderKind("torch.utils.data", "DataLoader", torch_loader),
    LoaderKind("datasets", "Dataset", _raise_for_rows),
    LoaderKind("datasets", "IterableDataset", _raise_for_rows),
    LoaderKind("tensorflow", "DatasetV2", tensorflow_loader),
)
"""All supported classes, including their subclasses."""


def adapted(data: Any) -> Any | None:
    """Returns a loader for data of a supported library, or None for any other value.

    Raises:
        BatchError: the data do not yield batches, such as a table of rows.
    """
    for base in type(data).__mro__:
        for package, name, adapt in KINDS:
            if base.__name__ == name and f"{base.__module__}.".startswith(f"{package}."):
                return adapt(data)
    return None

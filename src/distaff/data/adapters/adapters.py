"""Adapters: data of other libraries as loaders, recognised without importing any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from distaff.core import optional
from distaff.data.adapters.tensorflow import tensorflow_loader
from distaff.data.adapters.torch import torch_loader
from distaff.errors import BatchError


class LoaderKind(NamedTuple):
    """A kind of data.

    Attributes:
        package: where its class is defined, as the module's first names.
        name: of that class.
        adapt: makes a loader of it.
    """

    package: str
    name: str
    adapt: Callable[[Any], Any]


def _grain_loader(data: Any) -> Any:
    return optional.load("grain", extra="grain").make_loader(data)


def _refuse_rows(data: Any) -> NoReturn:
    raise BatchError(
        f"A loader yields batches; a {type(data).__name__} of Hugging Face holds rows. Write "
        "data.from_datasets(dataset, batch_size=..., shuffle=True)."
    )


KINDS = (
    LoaderKind("grain", "MapDataset", _grain_loader),
    LoaderKind("grain", "IterDataset", _grain_loader),
    LoaderKind("grain", "DataLoader", _grain_loader),
    LoaderKind("grain", "DatasetIterator", _grain_loader),
    LoaderKind("grain", "DataLoaderIterator", _grain_loader),
    LoaderKind("torch.utils.data", "DataLoader", torch_loader),
    LoaderKind("datasets", "Dataset", _refuse_rows),
    LoaderKind("datasets", "IterableDataset", _refuse_rows),
    LoaderKind("tensorflow", "DatasetV2", tensorflow_loader),
)
"""All kinds that are known; a class counts as its base classes do."""


def adapted(data: Any) -> Any | None:
    """Returns a loader of data of another library; None where it is of none that is known.

    Args:
        data: what a user passes as a loader.

    Raises:
        BatchError: it yields no batches, such as a table of rows; the remedy is named.
    """
    for base in type(data).__mro__:
        for package, name, adapt in KINDS:
            if base.__name__ == name and f"{base.__module__}.".startswith(f"{package}."):
                return adapt(data)
    return None

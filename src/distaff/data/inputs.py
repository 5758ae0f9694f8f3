"""What a trainer accepts as data: loaders, iterables of batches, or whole arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from distaff.core.config.argument import Argument
from distaff.core.config.options import Options, at_least, option, or_none
from distaff.core.seeds import folded
from distaff.core.typing import PyTree
from distaff.data.arrays import ArrayLoader
from distaff.data.loader import Loader, as_loader
from distaff.data.tables.coding import FrameCoding
from distaff.data.tables.frames import FrameTable, is_frame
from distaff.data.tables.standardize import Standardize
from distaff.data.tables.transform import Transform
from distaff.data.whole import is_array, whole_arrays
from distaff.errors import ConfigError


def _fitted(name: str, value: Any) -> Standardize | Transform:
    if not isinstance(value, Standardize | Transform):
        raise ConfigError(
            f"{name} must be fitted, data.Standardize.fit(train) or data.Transform."
            f"from_sklearn(transformer); got {value!r}."
        )
    return value


def _coding(name: str, value: Any) -> FrameCoding:
    if not isinstance(value, FrameCoding):
        raise ConfigError(
            f"{name} must be the coding of a table, data.from_frame(...).coding; got a "
            f"{type(value).__name__}."
        )
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputOptions(Options):
    """How arrays become batches, and batches inputs of the model."""

    batch_size: int = option(
        32,
        """Examples per batch where you pass arrays instead of a loader, and all of them if there
        are fewer. A loader has its own batch size.""",
        check=at_least(1),
        resume="same run",
    )
    standardize: Argument[Standardize | Transform | None] = option(
        None,
        """A `data.Standardize`, or a `data.Transform`, fitted on the training data. Each forward
        pass transforms the model's first input with it; the numbers are saved with the model.""",
        check=or_none(_fitted),
    )
    coding: Argument[FrameCoding | None] = option(
        None,
        """The coding of a `data.from_frame`. Data frames given to `train_model`, `eval_model` and
        `predict` are read with it; it is saved with the model.""",
        check=or_none(_coding),
    )


def loader_of(data: Any, options: InputOptions, *, name: str) -> Loader:
    """Returns a loader over arrays, in their order, or what `as_loader` returns for other data.

    Args:
        data: a loader, an iterable of batches, arrays (see `whole_arrays`), or a data frame.
        options: the batch size for arrays, and the coding of data frames.
        name: name of the data for errors, such as `"val"`.

    Raises:
        BatchError: the data are none of these, or it is ambiguous what they are.
    """
    arrays = _arrays(data, options, name)
    if arrays is None:
        return as_loader(data, name=name)
    return ArrayLoader(arrays, _batch_size(arrays, options))


def training_loader_of(data: Any, options: InputOptions, *, seed: int, epoch: int = 0) -> Loader:
    """Returns a shuffled loader over arrays, or what `as_loader` returns for other data.

    Args:
        data: a loader, an iterable of batches, arrays (see `whole_arrays`), or a data frame.
        options: the batch size for arrays, and the coding of data frames.
        seed: seed of the order.
        epoch: number of epochs trained before, whose orders are not repeated.

    Raises:
        BatchError: the data are none of these, or it is ambiguous what they are.
    """
    arrays = _arrays(data, options, "train")
    if arrays is None:
        return as_loader(data, name="train")
    seed = int(folded(seed)) % 2**64
    loader = ArrayLoader(arrays, _batch_size(arrays, options), shuffle=True, seed=seed)
    loader.set_state({**loader.get_state(), "epoch": epoch})
    return loader


def validation_loaders_of(val_loader: Any, options: InputOptions) -> dict[str, Loader]:
    """Returns the loaders of one or several validation sets, by the prefix of their metrics.

    Args:
        val_loader: any iterable of batches, or arrays; or a dict of these by name; None for none.
        options: the options for arrays.

    Raises:
        ConfigError: a name is not an identifier.
        BatchError: a value is not an iterable of batches.
    """
    if val_loader is None:
        return {}
    is_named = isinstance(val_loader, Mapping) and not any(
        is_array(each) for each in val_loader.values()
    )
    if not is_named:
        return {"val": loader_of(val_loader, options, name="val")}
    for name in val_loader:
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError(
                "A validation set's name is part of the names of its metrics, as in "
                f"val_clean/loss; got {name!r}. Use letters, digits and underscores."
            )
    named = {f"val_{name}": each for name, each in val_loader.items()}
    return {name: loader_of(each, options, name=name) for name, each in named.items()}


def _arrays(data: Any, options: InputOptions, name: str) -> PyTree | None:
    """Returns the arrays of whole arrays, a table or a data frame; None for batches."""
    coding = options.coding
    if isinstance(data, FrameTable) and data.coding != coding:
        remedy = (
            "Pass it to the trainer, coding=table.coding, so that it is saved with the model; or "
            "train on table.arrays, without it."
            if coding is None
            else "Pass the frame itself, or table parts of one from_frame, by data.split."
        )
        raise ConfigError(
            f"The {name} data have a coding of columns that the trainer does not have. {remedy}"
        )
    if is_frame(data):
        if coding is None:
            raise ConfigError(
                f"The {name} data are a data frame, and the trainer has no coding for it. Write "
                "table = data.from_frame(frame, target=...), and pass coding=table.coding to the "
                "trainer."
            )
        data = coding.encoded(data, name=name, with_target=name != "predict")
    return whole_arrays(data, name)


def _batch_size(arrays: PyTree, options: InputOptions) -> int:
    return min(options.batch_size, len(jax.tree.leaves(arrays)[0]))

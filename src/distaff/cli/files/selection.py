"""Selects from a table what a trained model takes."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distaff.cli.files.tables import ColumnFile, numbers
from distaff.data import INPUT_NAMES, FrameCoding
from distaff.data.entry import named
from distaff.errors import ConfigError, nearest

_TARGETS = ("label", "labels", "y", "target", "targets")


class Selection(NamedTuple):
    """What a model takes from a table.

    Attributes:
        batch: the arrays, as `predict` and `eval_model` take them.
        unused: the columns that are not in it.
    """

    batch: Any
    unused: Sequence[str]


def select(
    table: ColumnFile,
    example: Any,
    coding: FrameCoding | None,
    columns: Sequence[str],
    *,
    with_targets: bool,
) -> Selection:
    """Returns what a model takes from a table.

    Args:
        table: the table.
        example: a batch of one example, as the model was trained with.
        coding: the coding of the data frame that it was trained with, or None.
        columns: names or patterns of the columns of the model's input; else columns have the names
            of the entries of a batch, such as `x`, or `x_0` and `x_1` for `[batch, 2]`.
        with_targets: whether targets are needed.

    Raises:
        ConfigError: no columns fit the model's input.
        DataFileError: a value is not of the type that the model takes; the message has its column
            and row.
    """
    if coding is not None:
        return _coded(table, coding, columns, with_targets=with_targets)
    entries = _entries(example)
    batch, used = {}, []
    if columns:
        name = next((each for each in INPUT_NAMES if each in entries), None)
        if name is None:
            raise ConfigError(
                f"--columns fills the entry of a batch named {list(INPUT_NAMES)}; this model was "
                f"trained with {list(entries)}. Give the columns these names in the file."
            )
        used = _chosen(table, columns)
        batch[name] = _stacked(table, used, entries.pop(name), name)
    for name in () if with_targets else _TARGETS:
        entries.pop(name, None)
    for name, form in entries.items():
        found = _columns_of(table, name, form)
        used += found
        batch |= {name: _stacked(table, found, form, name)} if found else {}
    if not batch:
        wanted = ", ".join(_wanted(name, form) for name, form in entries.items())
        raise ConfigError(
            f"No column of {str(table.path)!r} has the name of an input. The model takes {wanted}; "
            f"the columns are {_listed(table.names)}. Name the columns of the input: --columns a b."
        )
    return Selection(batch, [name for name in table.names if name not in used])


def _entries(example: Any) -> dict[str, Any]:
    """Returns the arrays of an example by name."""
    if hasattr(example, "shape"):
        return {"x": example}
    if isinstance(example, tuple | list):
        example = dict(zip(("x", "y"), example, strict=False))
    entries = {name: each for name, each in named(example).items() if hasattr(each, "shape")}
    if not entries:
        raise ConfigError(
            "A table fits batches of named arrays only; this model was trained with a "
            f"{type(example).__name__}. Write an .npz file instead."
        )
    return entries


def _chosen(table: ColumnFile, columns: Sequence[str]) -> list[str]:
    """Returns the columns with these names or patterns, in this order."""
    found: list[str] = []
    for name in columns:
        matching = [name] if name in table.names else fnmatch.filter(table.names, name)
        if not matching:
            raise ConfigError(
                f"{str(table.path)!r} has no column {name!r}. {nearest(name, table.names)}"
            )
        found += [each for each in matching if each not in found]
    return found


def _columns_of(table: ColumnFile, name: str, form: Any) -> list[str]:
    """Returns the columns of an entry: its own, or one per value; empty if there are none."""
    if name in table.names:
        return [name]
    parts = [f"{name}_{place}" for place in range(math.prod(form.shape[1:]))]
    missing = [part for part in parts if part not in table.names]
    if missing and len(missing) < len(parts):
        raise ConfigError(
            f"The model takes {_wanted(name, form)}; {str(table.path)!r} has no column "
            f"{missing[0]!r}. Add it, or name the columns of the input: --columns a b."
        )
    return [] if missing else parts


def _stacked(table: ColumnFile, columns: Sequence[str], form: Any, name: str) -> np.ndarray:
    """Returns columns as one array with the shape of an entry, `[rows, ...]`."""
    read = [numbers(table, column, form.dtype) for column in columns]
    array = read[0] if len(read) == 1 else np.stack(read, axis=1)
    size = math.prod(array.shape[1:])
    if size != math.prod(form.shape[1:]):
        raise ConfigError(
            f"The model takes {_wanted(name, form)}; the columns {_listed(columns)} of "
            f"{str(table.path)!r} have {size} {'value' if size == 1 else 'values'} per row. Name "
            "the columns of the input: --columns a b."
        )
    return array.reshape(len(array), *form.shape[1:])


def _wanted(name: str, form: Any) -> str:
    size = math.prod(form.shape[1:])
    if len(form.shape) == 1:
        return f"{name!r}"
    return f"{name!r} with {size} {'value' if size == 1 else 'values'} per row"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{names[:10]}{more}"


def _coded(
    table: ColumnFile, coding: FrameCoding, columns: Sequence[str], *, with_targets: bool
) -> Selection:
    """Returns the arrays of the columns of the data frame that a model was trained with."""
    if columns:
        raise ConfigError(
            "This model was trained on a data frame with the columns "
            f"{_listed([*coding.numbers, *coding.categories])}. Leave out --columns."
        )
    target = coding.target if with_targets else None
    targets = (target,) if isinstance(target, str) else target or ()
    categories: dict[str, Sequence[Any]] = dict(coding.categories)
    if isinstance(target, str) and coding.labels is not None:
        categories[target] = coding.labels
    used = [*coding.numbers, *coding.categories, *targets]
    read = {
        name: _Series(
            _categories(table, name, categories[name])
            if name in categories
            else numbers(table, name, np.float64, bools=True)
        )
        for name in used
        if name in table.names
    }
    batch = coding.encoded(_Frame(read), name="given", with_target=with_targets)
    return Selection(batch, [name for name in table.names if name not in used])


def _categories(table: ColumnFile, name: str, known: Sequence[Any]) -> np.ndarray:
    if all(isinstance(value, bool) for value in known):
        return numbers(table, name, bool)
    if all(isinstance(value, int) for value in known):
        return numbers(table, name, np.int64)
    values = np.empty(len(column := table.column(name)), object)
    values[:] = [str(value) for value in column]
    return values


class _Series(NamedTuple):
    """A column as `FrameCoding` reads it."""

    values: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    def to_numpy(self) -> np.ndarray:
        return self.values

    def isna(self) -> _Series:
        return _Series(np.zeros(len(self.values), bool))


class _Frame:
    """A table as `FrameCoding` reads it."""

    def __init__(self, series: Mapping[str, _Series]) -> None:
        self.columns = list(series)
        self._series = series

    def __getitem__(self, name: str) -> _Series:
        return self._series[name]

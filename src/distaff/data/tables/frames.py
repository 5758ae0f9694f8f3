"""Reads data frames of pandas and polars, without importing these libraries."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from distaff.data.tables.coding import FrameCoding, check_columns, is_category, values_of
from distaff.errors import BatchError, ConfigError


@dataclasses.dataclass(frozen=True)
class FrameTable:
    """The arrays of a data frame, and the coding of its columns.

    Attributes:
        arrays: `{"x": inputs, "y": targets}`, each leaf `[rows, ...]`; see `FrameCoding.encoded`.
        coding: the coding of the columns, for the trainer's option `coding`.
    """

    arrays: Mapping[str, Any]
    coding: FrameCoding

    def __len__(self) -> int:
        return len(jax.tree.leaves(self.arrays)[0])

    def __getitem__(self, name: str) -> Any:
        """Returns `x` or `y` of the arrays."""
        return self.arrays[name]

    def rows(self, rows: np.ndarray) -> FrameTable:
        """Returns the table of some rows, by their indices."""
        return FrameTable(jax.tree.map(lambda array: array[rows], self.arrays), self.coding)


def from_frame(
    frame: Any,
    *,
    target: str | Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    categories: Sequence[str] = (),
) -> FrameTable:
    """Turns a data frame of pandas or polars into arrays, and keeps the coding of its columns.

    Columns of numbers and bools become one float matrix. Columns of texts, and of the category
    types of pandas and polars, become integer codes: in the order of the type, or sorted.

    Args:
        frame: a data frame.
        target: the column of the targets; a list of columns of numbers gives `[rows, targets]`.
        columns: the columns of the inputs, in their order; None for all but the target.
        categories: columns to code although they hold integers or bools, such as postal codes.

    Returns:
        The arrays, to train on, and the coding, to pass to the trainer.

    Raises:
        BatchError: a column is unknown, has missing values, or holds neither numbers nor
            categories; or there are no rows.
        ConfigError: it is not a data frame, there are no inputs, or a column is given twice.

    >>> import pandas
    >>> frame = pandas.DataFrame({"size": [1.0, 2.0], "city": ["Rome", "Bonn"], "price": [3, 4]})
    >>> table = from_frame(frame, target="price")
    >>> table.coding.categories, table["x"]["city"].tolist()
    ({'city': ('Bonn', 'Rome')}, [1, 0])
    """
    if not is_frame(frame):
        remedy = (
            "Call collect() first." if hasattr(frame, "collect") else "Pass arrays as they are."
        )
        raise ConfigError(
            "from_frame takes a data frame of pandas or polars; got a "
            f"{type(frame).__name__}. {remedy}"
        )
    targets = () if target is None else (target,) if isinstance(target, str) else tuple(target)
    found = [each for each in frame.columns if each not in targets]
    inputs = found if columns is None else list(columns)
    if not inputs or set(inputs) & set(targets) or isinstance(columns, str):
        raise ConfigError(
            f"columns must be a list of columns other than the target {target!r}; got {columns!r} "
            f"of {list(frame.columns)}. Write columns=['name', ...]."
        )
    check_columns(frame, (*inputs, *targets), "given")
    _check_distinct((*inputs, *targets))
    if not frame.shape[0]:
        raise BatchError("The data frame has no rows. Check how it is read and filtered.")
    if unknown := [each for each in categories if each not in (*inputs, *targets)]:
        raise ConfigError(f"categories must be among the columns; got {unknown} beyond {inputs}.")
    coded = [each for each in inputs if each in categories or is_category(frame, each)]
    labels = None
    if isinstance(target, str) and _is_label(frame, target, categories):
        labels = values_of(frame, target)
    coding = FrameCoding(
        tuple(each for each in inputs if each not in coded),
        {each: values_of(frame, each) for each in coded},
        target if target is None or isinstance(target, str) else targets,
        labels,
    )
    return FrameTable(coding.encoded(frame), coding)


def _check_distinct(columns: Sequence[str]) -> None:
    twice = sorted({each for each in columns if columns.count(each) > 1})
    if twice:
        raise ConfigError(f"Each column may be given once; got {twice} more than once.")


def is_frame(data: Any) -> bool:
    """Whether this is a data frame of pandas or polars, or has its members."""
    members = ("shape", "to_numpy", "columns")  # an Arrow table and a lazy frame lack some
    return not hasattr(data, "dtype") and all(hasattr(data, each) for each in members)


def _is_label(frame: Any, target: str, categories: Sequence[str]) -> bool:
    is_bool = np.asarray(frame[target].to_numpy()).dtype.kind == "b"
    return is_bool or target in categories or is_category(frame, target)

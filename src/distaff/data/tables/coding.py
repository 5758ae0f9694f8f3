"""FrameCoding: turns the columns of a data frame into arrays, always in the same way."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distaff.errors import BatchError, ConfigError, nearest

NUMBERS = "numbers"
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class FrameCoding:
    """How the columns of a data frame become arrays; `from_frame` makes it.

    Pass it to a trainer as the option `coding`: it is then saved with the model, and data frames
    given to `train_model`, `eval_model` and `predict` are read with it.

    Attributes:
        numbers: columns of numbers.
        categories: columns of categories, and the values of each in the order of their codes.
        target: the column of the targets, or several columns of numbers; None without targets.
        labels: the values of a target of categories, in the order of their codes; None if the
            target is a number.
    """

    numbers: tuple[str, ...]
    categories: Mapping[str, tuple[Any, ...]]
    target: str | tuple[str, ...] | None = None
    labels: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        if NUMBERS in self.categories:
            raise ConfigError(
                f"A column of categories must not be named {NUMBERS!r}, the name of the matrix of "
                "numbers. Rename it."
            )

    def encoded(self, frame: Any, *, name: str = "given", with_target: bool = True) -> Any:
        """Returns the arrays of a data frame: `{"x": inputs, "y": targets}`.

        Args:
            frame: a pandas or polars data frame, whose other columns are ignored.
            name: name of the data for errors, such as `"val"`.
            with_target: whether to return the targets, which the frame then must have.

        Returns:
            `x` is float64 `[rows, numbers]` if there are no categories. Otherwise it is a dict:
            `numbers` is that matrix, and each column of categories int32 `[rows]` by its name. `y`
            has the values of the target `[rows]`, int32 codes of its categories, or float64 `[rows,
            targets]` for several columns.

        Raises:
            BatchError: a column is missing, has missing values, an unknown category, or another
                type than the column of `from_frame`.
        """
        target = self.target if with_target else None
        targets = (target,) if isinstance(target, str) else target or ()
        check_columns(frame, (*self.numbers, *self.categories, *targets), name)
        inputs: dict[str, Any] = {
            column: codes(frame, column, values) for column, values in self.categories.items()
        }
        if self.numbers:
            inputs[NUMBERS] = _matrix(frame, self.numbers)
        arrays = {"x": inputs if self.categories else inputs[NUMBERS]}
        if isinstance(target, str):
            is_number = self.labels is None
            arrays["y"] = number(frame, target) if is_number else codes(frame, target, self.labels)
        elif targets:
            arrays["y"] = _matrix(frame, targets)
        return arrays


def check_columns(frame: Any, columns: Sequence[str], name: str) -> None:
    """Checks that a data frame has columns of these names, each once.

    Raises:
        BatchError: one is missing, or there are several of its name.
    """
    held = list(frame.columns)
    for column in columns:
        if column not in held:
            raise BatchError(
                f"The {name} data must have the column {column!r}; they have {held}. "
                f"{nearest(column, [each for each in held if isinstance(each, str)])}"
            )
        if held.count(column) > 1:
            raise BatchError(
                f"The {name} data have {held.count(column)} columns {column!r}. Rename or drop all "
                "but one."
            )


def is_category(frame: Any, column: str) -> bool:
    """Whether a column holds texts, or has a type of categories.

    Raises:
        BatchError: it holds neither numbers nor categories.
    """
    series = frame[column]
    is_text = _present(series, column).dtype.kind in "OUT"
    return is_text or _declared(series) is not None


def values_of(frame: Any, column: str) -> tuple[Any, ...]:
    """Returns the categories of a column: those that its type declares, or else sorted values.

    Raises:
        BatchError: values are missing, or are not all texts or all integers.
    """
    series = frame[column]
    declared = _declared(series)
    found = _present(series, column).tolist()
    values = list(dict.fromkeys(found)) if declared is None else declared
    kinds = {type(each) for each in values}
    if len(kinds) > 1 or not kinds <= {str, int, bool}:
        names = sorted(kind.__name__ for kind in kinds)
        raise BatchError(
            f"The categories of a column must be all texts or all integers; column {column!r} has "
            f"values of the types {names}. Cast it to one of them."
        )
    return tuple(values if declared is not None else sorted(values))


def codes(frame: Any, column: str, values: Sequence[Any]) -> np.ndarray:
    """Returns the index of each category of a column, int32 `[rows]`.

    Raises:
        BatchError: values are missing, or are not among the known ones.
    """
    code_of = {(type(value), value): code for code, value in enumerate(values)}
    found = _present(frame[column], column).tolist()
    unknown = [value for value in dict.fromkeys(found) if (type(value), value) not in code_of]
    if unknown:
        row, known = found.index(unknown[0]), list(values[:_SHOWN])
        more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
        raise BatchError(
            f"Column {column!r} has the unknown category {unknown[0]!r}, first in row {row}; known "
            f"are {known}{more}. Drop or replace it, or make the coding from a frame that has all "
            "categories, such as a column of a categorical type."
        )
    return np.array([code_of[type(value), value] for value in found], np.int32)


def number(frame: Any, column: str) -> np.ndarray:
    """Returns a column of numbers `[rows]`.

    Raises:
        BatchError: values are missing or infinite, or are not numbers.
    """
    values = _present(frame[column], column)
    if values.dtype.kind not in "biuf":
        raise BatchError(
            f"Column {column!r} must hold numbers; it holds {type(values[0]).__name__} values. "
            "Convert it, or make a coding in which it is a category."
        )
    if not np.isfinite(values).all():
        row = int(np.argmax(~np.isfinite(values)))
        raise BatchError(f"Column {column!r} has an infinite value in row {row}. Replace it.")
    return values


def _matrix(frame: Any, columns: Sequence[str]) -> np.ndarray:
    return np.stack([number(frame, each).astype(np.float64) for each in columns], axis=1)


def _declared(series: Any) -> list[Any] | None:
    """Returns the categories of the type of a column, or None; polars' `Categorical` has none."""
    categories = getattr(series.dtype, "categories", None)
    return list(categories) if hasattr(categories, "__len__") else None


def _present(series: Any, column: str) -> np.ndarray:
    """Returns the values of a column: numbers, texts, or Python objects.

    Raises:
        BatchError: values are missing, or cannot be an input, such as dates and lists.
    """
    values = np.asarray(series.to_numpy())
    is_missing = series.isna() if hasattr(series, "isna") else series.is_null()
    is_missing = np.asarray(is_missing.to_numpy(), bool)
    if values.dtype.kind == "f" and values.ndim == 1:
        is_missing = is_missing | np.isnan(values)
    if is_missing.any():
        raise BatchError(
            f"Column {column!r} has {int(is_missing.sum())} missing values, first in row "
            f"{int(np.argmax(is_missing))}. Fill or drop them: frame.dropna(subset=[{column!r}]) "
            f"in pandas, frame.drop_nulls({column!r}) in polars."
        )
    if values.dtype.hasobject and {type(each) for each in values} <= {int, float, bool}:
        values = np.array(values.tolist())
    is_odd = values.dtype.hasobject and not all(isinstance(x, str | int | bool) for x in values)
    if values.ndim != 1 or values.dtype.kind not in "biufOUT" or is_odd:
        raise BatchError(
            f"Column {column!r} must hold numbers or categories; it has the type {series.dtype}. "
            "Convert it to numbers, such as dates to days, or leave it out of columns."
        )
    return values

"""The model as a table: each module's arrays, with parameters, bytes and FLOPs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from distaff.models import LayerRow

_BYTES = ("B", "KiB", "MiB", "GiB", "TiB")
_FLOPS = ("", "k", "M", "G", "T", "P")

_MOST_LINES = 30
"""Most lines of a table that folds by itself, without its totals."""

_FOLDED = "folded; table_depth=None shows every array"

_UNLIMITED = 10_000

_FEWEST_FOLDED = 3
"""Fewest equal modules in a row that are shown as one line."""


class _Line(NamedTuple):
    """One line of the table: an array, or all arrays of a collection."""

    path: str
    parameters: str = ""
    bytes: str = ""
    shape: str = ""
    dtype: str = ""


class ModelTable:
    """A model as a table, which drops columns on a narrow terminal.

    Every column adds up to its total: a module's FLOPs exclude its submodules. For arrays
    that are not parameters, the collection, such as `(batch_stats)`, replaces the count.

    Args:
        rows: modules in order of call, as returned by `Model.layers`.
        title: the title of the table.
        depth: see `model_table`.
        folds: whether to show a series of equal modules as one line.
        note: a line below the table.
    """

    def __init__(
        self,
        rows: Sequence[LayerRow],
        title: str,
        depth: int | None,
        *,
        folds: bool = False,
        note: str = "",
    ) -> None:
        self._rows, self._title, self._depth, self._note = rows, title, depth, note
        self._groups = _folded(_groups(rows, depth)) if folds else _groups(rows, depth)
        self.num_lines = sum(max(1, len(self._lines(group))) for group in self._groups)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields the table with as many columns as fit."""
        unlimited = options.update(max_width=_UNLIMITED)
        counted = any(row.flops is not None for row in self._rows)
        flops = " (FLOPs: evaluation of the example batch)" if counted else ""
        yield Text(f"{self._title}{flops}", style="bold")
        for dropped in ((), ("dtype",), ("dtype", "bytes"), ("dtype", "bytes", "output")):
            table = self.table(dropped)
            if Measurement.get(console, unlimited, table).maximum <= options.max_width:
                break
        yield table
        if self._note:
            yield Text(self._note, style="dim")

    def heading(self) -> str:
        """Returns the name of the model and its number of parameters."""
        parameters, _ = _sums(self._rows).get("params", (0, 0))
        return f"{self._title}: {parameters:,} parameters"

    def table(self, dropped: Collection[str] = ()) -> Table:
        """Returns the table without some of its columns.

        Without the column `dtype`, arrays other than float32 have it before their shape.
        """
        rows = self._rows
        counted = any(row.flops is not None for row in rows)
        table = Table(box=None)
        names = ["path", "shape", "dtype", "parameters", "bytes", "FLOPs", "output"]
        absent = {*dropped, *([] if counted else ["FLOPs"])}
        absent |= set() if self._depth is None else {"shape", "dtype"}
        for name in names:
            if name not in absent:
                is_number = name in ("parameters", "bytes", "FLOPs")
                justify, style = "right" if is_number else "left", "dim" * (name == "output")
                table.add_column(name, justify=justify, style=style, no_wrap=name == "path")

        def add(line: _Line, flops: str = "", output: str = "", style: str = "") -> None:
            is_plain = line.dtype in ("", "float32") or "dtype" not in absent
            shape = line.shape if is_plain else f"{line.dtype}{line.shape}"
            cells = [line.path, shape, line.dtype, line.parameters, line.bytes, flops, output]
            shown = [cell for name, cell in zip(names, cells, strict=True) if name not in absent]
            table.add_row(*shown, style=style)

        for group in self._groups:
            first, *others = self._lines(group) or [_Line(group.name)]
            add(first, _flops(group.members), group.output)
            for line in others:
                add(line)
        total, *others = _totals(rows)
        add(total, _flops(rows), style="bold")
        for line in others:
            add(line)
        return table

    def _lines(self, group: _Group) -> list[_Line]:
        if self._depth is None:
            return _arrays(group.module)
        return _collections(group.members, group.name)


def model_table(
    rows: Sequence[LayerRow], title: str, depth: int | Literal["auto"] | None = None
) -> ModelTable:
    """Returns a model as a table, with one line per array or per module, and totals.

    Args:
        rows: modules in order of call, as returned by `Model.layers`.
        title: the title of the table.
        depth: levels of modules to show, one line each, with deeper modules added to their parent.
            0 shows the whole model in one line; None shows every array. `"auto"` shows every array
            of a small model, and as many levels of a large one as fit in 30 lines.

    Returns:
        A table with the columns path, shape and dtype (only if `depth` is None), parameters, bytes,
        FLOPs (if any are known), and output of the module.
    """
    if depth != "auto":
        return ModelTable(rows, title, depth)
    whole = ModelTable(rows, title, None)
    if whole.num_lines <= _MOST_LINES:
        return whole
    deepest = max(row.path.count("/") + 1 for row in rows)
    for level in range(deepest, 1, -1):
        table = ModelTable(rows, title, level, folds=True, note=_FOLDED)
        if table.num_lines <= _MOST_LINES:
            return table
    return ModelTable(rows, title, 1, folds=True, note=_FOLDED)


class _Group(NamedTuple):
    """A line of the table, or a few: a module with the modules that are added to it.

    Attributes:
        name: what to show as its path.
        output: what to show as its output.
        module: the module.
        members: the module itself, and those added to it.
    """

    name: str
    output: str
    module: LayerRow
    members: list[LayerRow]

    def form(self) -> Any:
        """Returns what is equal for modules that differ in their name only."""
        parent = self.module.path.rpartition("/")[0]
        return parent, self.module.kind, self.output, _flops(self.members), _sums(self.members)


def _folded(groups: Sequence[_Group]) -> list[_Group]:
    """Replaces each series of three or more equal modules by one group."""
    found: list[_Group] = []
    for _, series in itertools.groupby(groups, _Group.form):
        same = list(series)
        if len(same) < _FEWEST_FOLDED:
            found += same
            continue
        first, last = same[0], same[-1]
        name = f"{first.name} … {last.name.rpartition('/')[2]} ({len(same)})"
        members = [row for group in same for row in group.members]
        found.append(first._replace(name=name, members=members))
    return found


def _groups(rows: Sequence[LayerRow], depth: int | None) -> list[_Group]:
    """Returns the modules to show, each with itself and its submodules that are not shown."""
    shown = {
        row.path: (row, [])
        for row in rows
        if depth is None or len([name for name in row.path.split("/") if name]) <= depth
    }
    for row in rows:
        path = row.path
        while path and path not in shown:
            path = path.rpartition("/")[0]
        shown[path][1].append(row)
    return [
        _Group(row.path or row.kind, row.output, row, members) for row, members in shown.values()
    ]


def _arrays(row: LayerRow) -> list[_Line]:
    return [
        _Line(
            "/".join(part for part in (row.path, name) if part),
            f"{math.prod(shape):,}" if collection == "params" else f"({collection})",
            _scaled(_bytes(shape, dtype), 1024, _BYTES),
            str(list(shape)),
            str(dtype),
        )
        for collection, name, shape, dtype in row.variables
    ]


def _collections(rows: Sequence[LayerRow], path: str) -> list[_Line]:
    """Adds up the arrays of each collection, parameters first."""
    return [
        _Line(
            path,
            f"{values:,}" if collection == "params" else f"({collection})",
            _scaled(size, 1024, _BYTES),
        )
        for collection, (values, size) in _sums(rows).items()
    ]


def _totals(rows: Sequence[LayerRow]) -> list[_Line]:
    """Returns the line of the total, and one per collection of other arrays than parameters."""
    sums = _sums(rows)
    parameters, _ = sums.pop("params", (0, 0))
    size = sum(_bytes(shape, dtype) for row in rows for *_, shape, dtype in row.variables)
    return [
        _Line("total", f"{parameters:,}", _scaled(size, 1024, _BYTES)),
        *(
            _Line(f"{values:,} values", f"({collection})", _scaled(size, 1024, _BYTES))
            for collection, (values, size) in sums.items()
        ),
    ]


def _sums(rows: Sequence[LayerRow]) -> dict[str, tuple[int, int]]:
    """Returns values and bytes of each collection, parameters first."""
    arrays = [array for row in rows for array in row.variables]
    sums: dict[str, tuple[int, int]] = {}
    for collection, _, shape, dtype in sorted(arrays, key=lambda array: array[0] != "params"):
        values, size = sums.get(collection, (0, 0))
        sums[collection] = (values + math.prod(shape), size + _bytes(shape, dtype))
    return sums


def _flops(rows: Sequence[LayerRow]) -> str:
    known = [row.flops for row in rows if row.flops is not None]
    return _scaled(sum(known), 1000, _FLOPS) if known else ""


def _bytes(shape: tuple[int, ...], dtype: jnp.dtype) -> int:
    is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    return math.prod(shape) * (dtype if is_key else jnp.dtype(dtype)).itemsize


def _scaled(number: float, base: int, units: Sequence[str]) -> str:
    """Formats a number with a unit: `1.5 KiB`, `46.7 M`."""
    power = 0
    while number >= base and power < len(units) - 1:
        number /= base
        power += 1
    return f"{number:,.{min(power, 1)}f} {units[power]}".rstrip()

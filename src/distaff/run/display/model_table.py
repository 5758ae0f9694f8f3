"""The model as a table: each module's arrays, with parameters, bytes and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from rich.table import Table

from distaff.models import LayerRow

_BYTES = ("B", "KiB", "MiB", "GiB", "TiB")
_FLOPS = ("", "k", "M", "G", "T", "P")


class _Line(NamedTuple):
    """One line of the table: an array, or all arrays of a collection."""

    path: str
    parameters: str = ""
    bytes: str = ""
    shape: str = ""
    dtype: str = ""


def model_table(rows: Sequence[LayerRow], title: str, depth: int | None = None) -> Table:
    """Returns a model as a table, with one line per array or per module, and totals.

    Every column adds up to its total: a module's FLOPs exclude its submodules. For arrays
    that are not parameters, the collection, such as `(batch_stats)`, replaces the count.

    Args:
        rows: modules in order of call, as returned by `Model.layers`.
        title: the title of the table.
        depth: levels of modules to show, one line each, with deeper modules added to their parent.
            0 shows the whole model in one line; None shows every array.

    Returns:
        A table with the columns path, shape and dtype (only if `depth` is None), parameters, bytes,
        FLOPs (if any are known), and output of the module.
    """
    counted = any(row.flops is not None for row in rows)
    table = Table(title_justify="left", title_style="bold", box=None)
    table.title = f"{title} (FLOPs: evaluation of the example batch)" if counted else title
    table.add_column("path", no_wrap=True)
    for name in ("shape", "dtype") if depth is None else ():
        table.add_column(name)
    for name in ("parameters", "bytes", *(["FLOPs"] if counted else [])):
        table.add_column(name, justify="right")
    table.add_column("output", style="dim")

    def add(line: _Line, flops: str = "", output: str = "", style: str = "") -> None:
        array = [line.shape, line.dtype] if depth is None else []
        work = [flops] if counted else []
        table.add_row(line.path, *array, line.parameters, line.bytes, *work, output, style=style)

    for module, members in _groups(rows, depth):
        name = module.path or module.kind
        lines = _arrays(module) if depth is None else _collections(members, name)
        first, *others = lines or [_Line(name)]
        add(first, _flops(members), module.output)
        for line in others:
            add(line)
    total, *others = _totals(rows)
    add(total, _flops(rows), style="bold")
    for line in others:
        add(line)
    return table


def _groups(rows: Sequence[LayerRow], depth: int | None) -> list[tuple[LayerRow, list[LayerRow]]]:
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
    return list(shown.values())


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

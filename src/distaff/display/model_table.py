"""The model as a table: each module's arrays, with parameters and bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
from rich.table import Table

from distaff.models import LayerRow


def model_table(rows: Sequence[LayerRow], title: str) -> Table:
    """Lays out a model's arrays, one per line, with totals.

    Args:
        rows: modules in order of call, as `Model.layers` gives them.
        title: shown above.

    Returns:
        A table with the columns path, shape, dtype, parameters, bytes, and the module's output.
    """
    table = Table(title=title, title_justify="left", title_style="bold", show_footer=True, box=None)
    parameters = sum(math.prod(shape) for shape, _ in _arrays(rows, "params"))
    size = sum(_bytes(shape, dtype) for shape, dtype in _arrays(rows, None))
    table.add_column("path", footer="total", no_wrap=True)
    table.add_column("shape")
    table.add_column("dtype")
    table.add_column("parameters", footer=f"{parameters:,}", justify="right")
    table.add_column("bytes", footer=_readable(size), justify="right")
    table.add_column("output", style="dim")
    for row in rows:
        output = row.output
        if not row.variables:
            table.add_row(row.path or row.kind, "", "", "", "", output)
        for collection, name, shape, dtype in row.variables:
            trained = collection == "params"
            path = "/".join(part for part in (row.path, name) if part)
            table.add_row(
                path if trained else f"{path} ({collection})",
                str(list(shape)),
                str(dtype),
                f"{math.prod(shape):,}" if trained else "",
                _readable(_bytes(shape, dtype)),
                output,
            )
            output = ""
    return table


def _arrays(
    rows: Sequence[LayerRow], collection: str | None
) -> list[tuple[tuple[int, ...], jnp.dtype]]:
    return [
        (shape, dtype)
        for row in rows
        for kind, _, shape, dtype in row.variables
        if collection in (None, kind)
    ]


def _bytes(shape: tuple[int, ...], dtype: jnp.dtype) -> int:
    return math.prod(shape) * jnp.dtype(dtype).itemsize


def _readable(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"

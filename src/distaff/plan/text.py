"""The tables of a plan on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distaff.core.views.amounts import byte_text

_MOST_PARAMETERS = 8
_MOST_EXCHANGES = 8


def as_tables(plan: Any) -> str:
    """Returns the tables of a `TrainingPlan`."""
    parts = [
        _head(plan),
        _parameters(plan),
        _memory(plan),
        _traffic(plan),
        _time(plan),
        _grown(plan),
    ]
    parts += [f"warning: {each}" for each in plan.warnings]
    return "\n\n".join(filter(None, parts))


def _head(plan: Any) -> str:
    axes = ", ".join(f"{name}={size}" for name, size in plan.mesh.items() if size > 1)
    kind = "an upper bound: simulated CPU devices need more memory and traffic than accelerators"
    lines = [
        f"{plan.name} on {plan.target}: {plan.num_devices} x {plan.device}"
        f" ({axes or 'one device'})",
        f"batch of all devices: {plan.batch.removeprefix('(the whole tree) ')}",
        "all figures are per device and step" + (f"; {kind}" if plan.is_upper_bound else ""),
    ]
    return "\n".join(lines)


def _parameters(plan: Any) -> str:
    shown, rest = plan.parameters[:_MOST_PARAMETERS], plan.parameters[_MOST_PARAMETERS:]
    rows = [
        (each.path, f"{each.dtype}{list(each.shape)}", each.spec, byte_text(each.device_bytes))
        for each in shown
    ]
    if rest:
        left = byte_text(sum(each.device_bytes for each in rest))
        rows.append((f"{len(rest)} more", "", "", left))
    total = f"{plan.num_parameters:,} values"
    rows.append(("all parameters", total, "", byte_text(plan.parameter_bytes)))
    return _table(("parameter", "shape", "split over", "bytes"), rows)


def _memory(plan: Any) -> str:
    rows = [("state", byte_text(plan.state_bytes))]
    if plan.temporary_bytes is not None:
        rows.append(("temporary arrays", byte_text(plan.temporary_bytes)))
    if plan.peak_bytes is not None:
        rows.append(("peak", byte_text(plan.peak_bytes)))
    if plan.memory_bytes is not None:
        rows.append(("memory of a device", byte_text(plan.memory_bytes)))
    answer = {True: "fits", False: "does not fit", None: "unknown: pass --memory"}[plan.fits]
    rows.append(("fit", answer))
    return _table(("memory", ""), rows) + (f"\n{plan.verdict}" if plan.verdict else "")


def _traffic(plan: Any) -> str:
    if not plan.collectives:
        return ""
    bound = " (upper bound)" if plan.traffic_from.startswith("cpu") else ""
    totals = _table(
        ("exchange", f"bytes, from the program for {plan.traffic_from}{bound}"),
        [(name, byte_text(size)) for name, size in plan.traffic.items()],
    )
    largest = plan.collectives[:_MOST_EXCHANGES]
    rows = [
        (each.kind, "+".join(each.axes), f"{each.count}x", byte_text(each.num_bytes), _where(each))
        for each in largest
    ]
    return totals + "\n\n" + _table(("largest", "over", "number", "bytes", "from"), rows)


def _where(each: Any) -> str:
    return f"{each.source} at {each.line}" if each.line else each.source


def _time(plan: Any) -> str:
    flops = ", ".join(f"{count:.3g} in {dtype}" for dtype, count in plan.flops.items() if count)
    moved = byte_text(plan.memory_traffic)
    if plan.traffic_from.startswith("cpu"):
        moved += ", too high: the program for CPUs fuses fewer operations"
    rows = [("FLOPs", flops), ("memory traffic", moved)]
    times = plan.times
    if times is not None:
        rows += [
            ("time of the products", _milliseconds(times.compute)),
            ("time of the memory", _milliseconds(times.memory)),
        ]
        rows += [
            (f"time over {name}", _milliseconds(size))
            for name, size in times.network_by_axis.items()
        ]
        rows.append(("step at least", f"{_milliseconds(times.step)}, bound by {times.bound}"))
    return _table(("work", ""), rows)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _grown(plan: Any) -> str:
    """Returns the table of doubled axes, and which one to grow first."""
    if not plan.doubled:
        return ""
    rates = ("exchanged per example",)
    if plan.times is not None:
        rates = ("step at least", "bound by", "examples/s of a device at most")
    head = ("twice the size", "devices", "state", "peak", "exchanged", *rates)
    rows = [_grown_row("as planned", plan.brief(), len(head))]
    rows += [_grown_row(f"{each.axis}={each.size}", each, len(head)) for each in plan.doubled]
    failures = [f"{each.axis}={each.size}: {each.failure}" for each in plan.doubled if each.failure]
    best = plan.first_to_grow
    answer = "none of them fits" if best is None else _gain(plan, best)
    return "\n".join([_table(head, rows), *failures, f"axis to grow first: {answer}"])


def _grown_row(name: str, each: Any, num_columns: int) -> tuple[str, ...]:
    cells = [name, str(each.num_devices)]
    if not each.failure:
        peak = "unknown" if each.peak_bytes is None else byte_text(each.peak_bytes)
        peak += ", does not fit" if each.fits is False else ""
        cells += [byte_text(each.state_bytes), peak, byte_text(each.exchanged_bytes)]
        if each.times is None:
            cells.append(byte_text(each.bytes_per_example))
        else:
            rate = each.examples_per_second or 0.0
            cells += [_milliseconds(each.times.step), each.times.bound, f"{rate:.3g}"]
    return (*cells, *[""] * (num_columns - len(cells)))


def _gain(plan: Any, best: Any) -> str:
    before, after = plan.brief().examples_per_second, best.examples_per_second
    if not before or not after:
        return f"{best.axis}, which exchanges the fewest bytes for each example"
    return f"{best.axis}, which keeps {after / before:.0%} of the examples per second and device"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns columns of text; the last one is not padded."""
    lines = [head, *rows]
    widths = [max(len(line[n]) for line in lines) for n in range(len(head))]
    padded = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join(padded)

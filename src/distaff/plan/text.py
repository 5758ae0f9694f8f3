"""The tables of a plan on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distaff.core.views.amounts import byte_text

_MOST_PARAMETERS = 8
_MOST_EXCHANGES = 8


def as_tables(plan: Any) -> str:
    """Returns the tables of a `TrainingPlan`."""
    parts = [_head(plan), _parameters(plan), _memory(plan), _traffic(plan), _time(plan)]
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
    rows = [("FLOPs", flops), ("memory traffic", byte_text(plan.memory_traffic))]
    times = plan.times
    if times is not None:
        parts = [f"{name} {getattr(times, name) * 1e3:.3g} ms" for name in _TERMS]
        rows.append(("time at full rates", ", ".join(parts)))
        rows.append(("step at least", f"{times.step * 1e3:.3g} ms, bound by {times.bound}"))
    return _table(("work", ""), rows)


_TERMS = ("compute", "memory", "network")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns columns of text; the last one is not padded."""
    lines = [head, *rows]
    widths = [max(len(line[n]) for line in lines) for n in range(len(head))]
    padded = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join(padded)

"""What the rounds say: medians, ratios of rounds that ran side by side, and tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.systems import REFERENCE, SECTIONS, SYSTEMS
from benchmarks.workloads import ALL

Results = Mapping[str, Any]


def summarise(measured: Mapping[str, Any], steps: int, reference: str = REFERENCE) -> None:
    """Adds to each system `ms_per_step` (median), `min_ms`, `spread` and its ratios.

    A ratio is the median over the rounds of this system's time to that of the other in the same
    round. `spread` is the range of a system's rounds over their median.

    Args:
        measured: what `rounds.measure` returned.
        steps: steps of a round.
        reference: the system that `ratio` is to; `ratio_to_best` is to the best hand-written form.
    """
    systems = {name: entry for name, entry in measured["systems"].items() if entry["seconds"]}
    for entry in systems.values():
        milliseconds = [1e3 * seconds / steps for seconds in entry["seconds"]]
        middle = statistics.median(milliseconds)
        entry["ms_per_step"], entry["min_ms"] = middle, min(milliseconds)
        entry["spread"] = (max(milliseconds) - min(milliseconds)) / middle
    hands = [name for name in systems if name in SYSTEMS and SYSTEMS[name].by_hand]
    best = min(hands, key=lambda name: systems[name]["ms_per_step"], default=None)
    measured["best_by_hand"] = best
    for key, other in (("ratio", reference), ("ratio_to_best", best)):
        for entry in systems.values():
            entry[key] = (
                ratio(entry["seconds"], systems[other]["seconds"]) if other in systems else None
            )


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """Returns the median of the ratios of rounds that ran side by side."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=False))


def host_cost(measured: Mapping[str, Any]) -> float | None:
    """Returns how many microseconds of host time a single step of Distaff costs over a loop's."""
    systems = measured["systems"]
    if not {"distaff K=1", REFERENCE} <= set(systems):
        return None
    pairs = zip(systems["distaff K=1"]["seconds"], systems[REFERENCE]["seconds"], strict=False)
    return statistics.median(1e6 * (ours - hand) / measured["steps"] for ours, hand in pairs)


Table = tuple[str, list[str], list[list[str]]]
"""Title, columns, rows."""


def tables(results: Results) -> list[Table]:
    """Returns everything that was measured, as tables of text."""
    made = [_workload_table(n, measured) for n, measured in results["workloads"].items()]
    made += _host_cost_table(results["workloads"])
    made += [_section_table(n, measured) for n, measured in results["sections"].items()]
    return made + [
        (
            other["title"],
            other["columns"],
            [[_shown(cell) for cell in row] for row in other["rows"]],
        )
        for other in results["others"].values()
    ]


def _workload_table(name: str, measured: Mapping[str, Any]) -> Table:
    columns = [
        "system",
        "ms per step",
        "best",
        "spread",
        "x hand loop",
        "x best by hand",
        "peak MB",
    ]
    rows = [
        [
            *(system, _shown(entry["ms_per_step"]), _shown(entry["min_ms"])),
            *(f"{entry['spread']:.0%}", _ratio(entry["ratio"]), _ratio(entry["ratio_to_best"])),
            f"{entry['peak_mb']:.0f}",
        ]
        for system, entry in measured["systems"].items()
        if entry["seconds"]
    ]
    return f"{name}: {ALL[name].title}", columns, rows


def _host_cost_table(workloads: Mapping[str, Any]) -> list[Table]:
    """Returns what the host does for a step of Distaff; where steps are slow it is not seen."""
    cost = host_cost(workloads.get("W1", {"systems": {}}))
    if cost is None:
        return []
    title = "Host time that one program per step costs Distaff more than the hand loop"
    return [(title, ["workload", "us per step"], [["W1", f"{cost:+.0f}"]])]


def _section_table(name: str, measured: Mapping[str, Any]) -> Table:
    section = SECTIONS[name]
    columns, rows = ["system", section.unit, "spread", f"time, x {section.reference}"], []
    for system, entry in measured["systems"].items():
        value = entry["ms_per_step"]
        if section.unit.endswith("/s"):
            value = 1e3 * ALL[section.workload].batch_size / value
        rows.append([system, _shown(value), f"{entry['spread']:.0%}", _ratio(entry["ratio"])])
    return section.title, columns, rows


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def markdown(results: Results) -> str:
    """Returns the tables as Markdown, with what they were measured on above them."""
    lines = [f"Measured {facts(results)}.", ""]
    for title, columns, rows in tables(results):
        right = ["---", *["---:"] * (len(columns) - 1)]
        lines += [f"**{title}**", ""]
        lines += [f"| {' | '.join(cells)} |" for cells in (columns, right, *rows)]
        lines.append("")
    return "\n".join(lines)


def facts(results: Results) -> str:
    """Returns when and on what the results were measured, in one line."""
    machine, versions = results["machine"], results["versions"]["core"]
    return (
        f"{results['date'][:10]} on {machine['device']}, {machine['cores']} cores of "
        f"{machine['cpu']}, {machine['memory_gb']:.0f} GB, load "
        f"{machine['load_before']:.1f} before and {machine['load_after']:.1f} after; "
        f"Distaff {versions['distaff']} at {results['commit']}, "
        f"JAX {versions['jax']}, Python {versions['python']}"
    )


def loss_differences(measured: Mapping[str, Any]) -> dict[str, float]:
    """Returns by how much the losses of systems with the same arithmetic differ from the first's.

    Returns:
        The largest relative difference over the first two rounds, by system. Later ones have
        forgotten nothing, but rounding grows from step to step.
    """
    same = [n for n, s in SYSTEMS.items() if s.by_hand or s.module in ("by_hand", "distaff_system")]
    losses = {n: e["losses"][:2] for n, e in measured["systems"].items() if n in same}
    first = next(iter(losses.values()), [])
    return {
        name: max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(own, first, strict=False))
        for name, own in losses.items()
    }

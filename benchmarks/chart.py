"""Draws a results file: a bar per system, a panel per workload.

    .venv/bin/python -m benchmarks.chart benchmarks/results/2026-11-24_120000.json [FILE.png]

The picture is `docs/images/bench.png` unless another file is named.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from benchmarks.report import facts
from benchmarks.rounds import ROOT
from benchmarks.systems import SYSTEMS
from benchmarks.workloads import ALL

# Okabe and Ito's palette, told apart by the colour-blind.
_DISTAFF, _BY_HAND, _OTHER = "#D55E00", "#56B4E9", "#BBBBBB"
_LONGEST = 6.0
"""Bars longer than this many times the hand loop are cut; their number stands beside them."""


def colour(system: str) -> str:
    """Returns the colour of a system's bar."""
    if system.startswith("distaff"):
        return _DISTAFF
    return _BY_HAND if SYSTEMS[system].by_hand or system.startswith("hand") else _OTHER


def draw_panel(axes: Axes, name: str, measured: Mapping[str, Any]) -> None:
    """Draws one workload, the fastest system on top."""
    entries = [(n, e) for n, e in measured["systems"].items() if e.get("ratio")]
    entries.sort(key=lambda item: item[1]["ratio"], reverse=True)
    names = [n for n, _ in entries]
    ratios = [e["ratio"] for _, e in entries]
    axes.barh(names, [min(r, _LONGEST) for r in ratios], color=[colour(n) for n in names])
    for row, (_, entry) in enumerate(entries):
        place = min(entry["ratio"], _LONGEST) + 0.03
        cut = " →" if entry["ratio"] > _LONGEST else ""
        label = f"{entry['ratio']:.2f}{cut}  ({entry['ms_per_step']:.3g} ms)"
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.text(place, row, label, va="center", fontsize=7, bbox=white)
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":", zorder=0)
    axes.set_title(f"{name}: {ALL[name].title}", fontsize=9, loc="left", x=-0.3)
    axes.set_xlim(0, 1.35 * min(max(ratios, default=1.0), _LONGEST))
    axes.tick_params(labelsize=8)
    for label, system in zip(axes.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if system.startswith("distaff") else "normal")
    axes.spines[["top", "right"]].set_visible(False)


def draw(results: Mapping[str, Any], file: Path) -> None:
    """Draws all workloads of the results into a PNG file."""
    workloads = results["workloads"]
    rows = -(-len(workloads) // 2)
    figure, panels = plt.subplots(
        rows, min(2, len(workloads)), figsize=(10, 0.6 + 3.1 * rows), squeeze=False
    )
    for axes in panels.flat[len(workloads) :]:
        axes.set_visible(False)
    for axes, (name, measured) in zip(panels.flat, workloads.items(), strict=False):
        draw_panel(axes, name, measured)
    for axes in panels[-1]:
        axes.set_xlabel("time of a step, hand-written loop = 1 (shorter is faster)", fontsize=8)
    kinds = {"Distaff": _DISTAFF, "by hand": _BY_HAND, "other frameworks": _OTHER}
    figure.legend(
        handles=[Patch(color=c, label=label) for label, c in kinds.items()],
        loc="upper right",
        ncols=3,
        fontsize=8,
        frameon=False,
    )
    figure.text(0.01, 0.005, facts(results), fontsize=6, color="#555555")
    figure.tight_layout(rect=(0, 0.02, 1, 0.96))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main() -> None:
    """Draws the file that the command line names."""
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "docs" / "images" / "bench.png"
    draw(json.loads(Path(sys.argv[1]).read_text()), target)
    print(f"written: {target}")


if __name__ == "__main__":
    main()

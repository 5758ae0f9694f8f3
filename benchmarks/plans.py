"""Plans of GPTs of 1, 7 and 70 billion parameters on 8 to 4,096 devices, as a table in Markdown.

    make bench-plans [ARGS="--only h100 --out plans.json"]

Each plan is compiled by the compiler of the target; those for GPUs also with each axis of the mesh
doubled. No figure depends on the clock. Each device of `data` x `fsdp` has one sequence; `tensor`
is a host.
"""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distaff import MeshConfig
from distaff.core.views.amounts import byte_text
from distaff.plan import TrainingPlan, plan_recipe

RECIPE = f"{Path(__file__).parent / 'scripts' / 'plan_gpt.py'}:main"

PLANS = (
    *(("1B", "h100:8", 8, 1), ("1B", "h100:8x8", 64, 1), ("1B", "h100:64x8", 512, 1)),
    *(("7B", "h100:8x8", 64, 1), ("7B", "h100:32x8", 256, 1), ("7B", "h100:512x8", 512, 8)),
    *(("70B", "h100:32x8", 256, 1), ("70B", "h100:512x8", 512, 8)),
    *(("1B", "v5e:4x4", 16, 1), ("7B", "v5e:16x16", 256, 1), ("70B", "v5p:16x16x16", 512, 8)),
)
"""The size of the model, the target, and the sizes of `fsdp` and `tensor`."""

RULES = (
    ("blocks/out/kernel", (None, "tensor", "fsdp")),
    ("blocks/down/kernel", (None, "tensor", "fsdp")),
)
"""Kernels that follow one that is split over `tensor`: they sum over what it splits."""


def planned(size: str, target: str, fsdp: int, tensor: int) -> TrainingPlan:
    """Returns one plan. GPUs are cheap to compile for, so each axis is doubled, too."""
    mesh = MeshConfig(1, fsdp=fsdp, tensor=tensor, rules=RULES if tensor > 1 else ())
    double = not target.startswith("v")
    return plan_recipe(
        RECIPE, ["--size", size], target=target, mesh=mesh, batch_size=fsdp, double=double
    )


def row(size: str, plan: TrainingPlan) -> list[str]:
    """Returns the cells of a plan."""
    axes = " x ".join(f"{name} {number}" for name, number in plan.mesh.items() if number > 1)
    exchanged = sum(each.num_bytes for each in plan.collectives)
    is_own = plan.traffic_from == plan.target  # else from a program for CPUs, an upper bound
    source = "" if is_own else " (CPU)"
    bound = plan.times.bound if plan.times and is_own else "unknown"
    grow = "not planned"
    if plan.doubled:
        kept = [gain(plan, each) for each in plan.doubled]
        best = plan.first_to_grow
        grow = f"**{best.axis}**: {', '.join(kept)}" if best else "none fits"
    peak = "does not fit" if plan.peak_bytes is None else byte_text(plan.peak_bytes)
    return [
        *(size, f"`{plan.target}`", axes, byte_text(plan.state_bytes), peak),
        *(byte_text(exchanged) + source, bound, grow),
    ]


def gain(plan: TrainingPlan, each: Any) -> str:
    """Returns the share of examples per second and device that a doubled axis keeps."""
    before, after = plan.brief().examples_per_second, each.examples_per_second
    return f"{each.axis} {after / before:.0%}" if before and after else f"{each.axis} -"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Returns the rows as a table in Markdown."""
    head = ("model", "target", "mesh", "state", "peak", "exchanged", "bound by", "grow first")
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Runs the plans that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="plans with this in their size or target")
    parser.add_argument("--out", default="", help="where to write the plans as JSON")
    options = parser.parse_args()
    rows, found = [], []
    for size, *place in PLANS:
        if options.only not in f"{size} {place[0]}":
            continue
        plan = planned(size, *place)
        rows.append(row(size, plan))
        found.append({"size": size, **plan.to_json()})
        print(f"| {' | '.join(rows[-1])} |", flush=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    most = byte_text(max((each["host_bytes"] for each in found), default=0))
    print(f"\n{table(rows)}\n\n{used.ru_utime + used.ru_stime:.0f} CPU seconds; {most} at most")
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

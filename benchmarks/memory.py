"""Whether the memory of a long run grows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.rounds import Worker
from benchmarks.workloads import WORKLOADS

_STEPS, _FIRST, _LAST = 1000, 2000, 12_000


def growth(folder: Path) -> dict[str, Any]:
    """Trains W1 for 12,000 steps, each 1,000 an epoch, and looks at the resident memory.

    Args:
        folder: for the run's files.

    Returns:
        A table: the memory after 2,000 and after 12,000 steps, of Distaff and of a hand loop.
    """
    workload = dataclasses.replace(WORKLOADS["W1"], steps=_STEPS)
    rows, raw = [], {}
    for system in ("distaff", "hand loop"):
        worker = Worker(system, workload, folder / system.replace(" ", "_"))
        try:
            worker.answer()
            raw[system] = [worker.round()["rss_mb"] for _ in range(_LAST // _STEPS)]
        finally:
            worker.close()
        first, last = raw[system][_FIRST // _STEPS - 1], raw[system][-1]
        rows.append([system, first, last, last - first])
    columns = ["system", f"MB at {_FIRST:,} steps", f"MB at {_LAST:,}", "grown by"]
    return {"title": "Memory over 10,000 steps", "columns": columns, "rows": rows, "raw": raw}

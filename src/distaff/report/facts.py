"""Gathers the facts of a report from the files of runs, as JSON."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from distaff.core.paths import shown
from distaff.loggers.history import History
from distaff.report.summary import Summary, flat_config, num_bytes, read_mapping
from distaff.run.directory.curves import CURVES
from distaff.run.directory.run_directory import RunDirectory

MOST_POINTS = 15_000
"""The most points of all curves together, about 330 kB; longer curves are thinned."""

_FEWEST_POINTS = 50

_MEDIA = {".svg": "image/svg+xml", ".png": "image/png"}
_CURVES = PurePath(CURVES).stem  # the report draws them itself
_MOST_TEXT = 8_000
_SEED = "seed"


def gather(paths: Sequence[Path], image_bytes: int) -> dict[str, Any]:
    """Returns the facts of a report.

    Args:
        paths: directories of the runs.
        image_bytes: the most bytes of figures and images, shared by the runs.

    Raises:
        RunDirectoryError: a path has no run.
    """
    runs = [_run(path, image_bytes // len(paths), MOST_POINTS // len(paths)) for path in paths]
    keys = dict.fromkeys(key for run in runs for key in run["options"])
    differs = [key for key in keys if len({repr(run["options"].get(key)) for run in runs}) > 1]
    for run in runs:
        rest = {key: value for key, value in run["options"].items() if key != _SEED}
        run["group"] = repr(sorted(rest.items(), key=lambda pair: pair[0]))
    groups = list(dict.fromkeys(run["group"] for run in runs))
    for run in runs:
        run["group"] = groups.index(run["group"])
    return {"runs": runs, "differs": differs}


def _run(path: Path, image_bytes: int, most_points: int) -> dict[str, Any]:
    summary = Summary.read(path)
    images, left_out = _images(summary.path, image_bytes)
    return {
        **dataclasses.asdict(summary),
        "path": shown(summary.path),
        "options": {key: _text(value) for key, value in flat_config(summary.path).items()},
        "curves": dict(_curves(summary.path, most_points)),
        "num_bytes": num_bytes(summary.path),
        "model": _read(summary.path / "model.txt"),
        "log": _read(summary.path / "log.txt", from_end=True),
        "environment": _environment(summary.path),
        "throughput": _throughput(summary.path),
        "images": images,
        "left_out": left_out,
    }


def _curves(path: Path, most_points: int) -> Iterator[tuple[str, dict[str, list[Any]]]]:
    """Yields the scalar metrics of a run by name, with steps and epochs."""
    history = History.read(path)
    steps, epochs = history.steps, history.epochs
    curves = {n: x for n, x in history.items() if x.ndim == 1 and x.dtype != object}
    for name, values in curves.items():
        kept = _thinned(len(values), max(_FEWEST_POINTS, most_points // len(curves)))
        yield (
            name,
            {
                "step": steps[name][kept].tolist(),
                "epoch": epochs[name][kept].tolist(),
                "value": [_finite(value) for value in values[kept].tolist()],
            },
        )


def _thinned(count: int, most: int) -> np.ndarray:
    """Returns the indices of the points to keep, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _environment(path: Path) -> dict[str, str]:
    facts = read_mapping(RunDirectory.open(path), "env.json")
    packages = facts.get("packages")
    devices = facts.get("devices")
    named = {"python": facts.get("python"), **(packages if isinstance(packages, dict) else {})}
    named["platform"] = facts.get("platform")
    if isinstance(devices, dict):
        named["devices"] = f"{devices.get('count')} x {devices.get('kind')}"
    named["git"] = facts.get("git")
    return {name: _text(value) for name, value in named.items() if value is not None}


def _throughput(path: Path) -> dict[str, float]:
    facts = read_mapping(RunDirectory.open(path), "status.json").get("throughput")
    if not isinstance(facts, dict):
        return {}
    seconds = facts.get("seconds")
    parts = {f"{name} (s)": v for name, v in seconds.items()} if isinstance(seconds, dict) else {}
    rates = {
        "steps per second": facts.get("steps_per_second"),
        "examples per second": facts.get("examples_per_second"),
        "share of peak (MFU)": facts.get("share_of_peak"),
    }
    numbers = {**rates, **parts}
    return {name: float(v) for name, v in numbers.items() if isinstance(v, (int, float))}


def _images(path: Path, budget: int) -> tuple[list[dict[str, str]], list[str]]:
    """Returns figures and images as data URLs, and the names of those beyond the budget."""
    files = [
        file for folder in ("figures", "images") for file in sorted((path / folder).rglob("*"))
    ]
    kept, left_out = [], []
    for file in files:
        if file.suffix not in _MEDIA or file.stem == _CURVES or not file.is_file():
            continue
        name, size = file.relative_to(path).as_posix(), file.stat().st_size
        if size * 4 / 3 > budget:
            left_out.append(name)
            continue
        budget -= size * 4 // 3
        data = base64.b64encode(file.read_bytes()).decode("ascii")
        kept.append({"name": name, "url": f"data:{_MEDIA[file.suffix]};base64,{data}"})
    return kept, left_out


def _read(file: Path, *, from_end: bool = False) -> str:
    if not file.is_file():
        return ""
    text = file.read_text("utf-8", errors="replace")
    return text[-_MOST_TEXT:] if from_end else text[:_MOST_TEXT]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)

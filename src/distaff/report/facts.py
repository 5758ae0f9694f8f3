"""Gathers the facts of a report from the files of runs, as JSON."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distaff.core.paths import shown
from distaff.errors import DistaffError
from distaff.report.curves import curves
from distaff.report.media import logged_texts, pictures
from distaff.report.summary import Summary, flat_config, num_bytes, read_mapping
from distaff.run.directory.run_directory import RunDirectory

MOST_NUMBERS = 50_000
"""The most numbers of all curves together, about 350 kB; longer curves are thinned."""

_ALL_TEXT, _MOST_TEXT = 50_000, 8_000
"""The most characters of a kind of text, such as logs, of all runs together, and of one run."""
_SEED = "seed"


class _Budget(NamedTuple):
    """The most that a report has of one run.

    Attributes:
        image_bytes: bytes of figures and images.
        numbers: numbers of curves.
        characters: characters of the model, of the log, and of logged texts, each.
    """

    image_bytes: int
    numbers: int
    characters: int

    @classmethod
    def of_each(cls, num_runs: int, image_bytes: int) -> _Budget:
        """Returns the budget of each of several runs."""
        count = max(1, num_runs)
        characters = min(_MOST_TEXT, _ALL_TEXT // count)
        return cls(image_bytes // count, MOST_NUMBERS // count, characters)


def gather(paths: Sequence[Path], image_bytes: int) -> dict[str, Any]:
    """Returns the facts of a report.

    Args:
        paths: directories of the runs.
        image_bytes: the most bytes of figures and images, shared by the runs.

    Raises:
        RunDirectoryError: a path has no run, or a file of it is damaged.
    """
    budget = _Budget.of_each(len(paths), image_bytes)
    return _compared([_run(path, budget) for path in paths])


def gather_present(paths: Sequence[Path], image_bytes: int) -> dict[str, Any]:
    """Returns the facts of a report on those runs that can be read at present.

    The others, such as one that is being removed, are listed as `unreadable`.
    """
    runs, unreadable = [], []
    budget = _Budget.of_each(len(paths), image_bytes)
    for path in paths:
        try:
            runs.append(_run(path, budget))
        except (DistaffError, OSError) as error:
            unreadable.append({"path": shown(path), "why": str(error)})
    return {**_compared(runs), "unreadable": unreadable}


def _compared(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the facts of runs with what differs; runs of one group differ in the seed only."""
    keys = dict.fromkeys(key for run in runs for key in run["options"])
    differs = [key for key in keys if len({repr(run["options"].get(key)) for run in runs}) > 1]
    for run in runs:
        rest = {key: value for key, value in run["options"].items() if key != _SEED}
        run["group"] = repr(sorted(rest.items(), key=lambda pair: pair[0]))
    groups = list(dict.fromkeys(run["group"] for run in runs))
    for run in runs:
        run["group"] = groups.index(run["group"])
    return {"runs": runs, "differs": differs}


def _run(path: Path, budget: _Budget) -> dict[str, Any]:
    summary = Summary.read(path)
    images, left_out = pictures(summary.path, budget.image_bytes)
    texts, others = logged_texts(summary.path, budget.characters)
    drawn = curves(summary.path, budget.numbers)
    return {
        **dataclasses.asdict(summary),
        **_progress(summary, drawn),
        "path": shown(summary.path),
        "options": {key: _text(value) for key, value in flat_config(summary.path).items()},
        **drawn,
        "num_bytes": num_bytes(summary.path),
        "model": _read(summary.path / "model.txt")[: budget.characters],
        "log": _read(summary.path / "log.txt")[-budget.characters :],
        "environment": _environment(summary.path),
        "throughput": _throughput(summary.path),
        "repeat": _repeat(summary),
        "images": images,
        "texts": texts,
        "left_out": left_out + others,
    }


def _progress(summary: Summary, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Returns where a run stands that has not ended, from the last values of its curves."""
    if summary.metrics or not drawn["axes"]:
        return {}
    last = {key: max(axis[key][-1] for axis in drawn["axes"]) for key in ("step", "epoch")}
    values = {name: curve["value"][-1] for name, curve in drawn["curves"].items()}
    ends = {n: x for n, x in values.items() if x is not None and not n.startswith("step/")}
    return {**last, "metrics": ends}


def _environment(path: Path) -> dict[str, str]:
    facts = read_mapping(RunDirectory.open(path), "env.json")
    devices, commit = facts.get("devices"), _commit(facts)
    named = {"python": facts.get("python"), **_packages(facts), "platform": facts.get("platform")}
    if isinstance(devices, dict):
        named["devices"] = f"{devices.get('count')} x {devices.get('kind')}"
    if commit:
        named["commit"] = f"{commit[0]}{', with uncommitted changes' if commit[1] else ''}"
    return {name: _text(value) for name, value in named.items() if value is not None}


def _packages(facts: Mapping[str, Any]) -> dict[str, str]:
    packages = facts.get("packages")
    known = packages.items() if isinstance(packages, dict) else ()
    return {name: version for name, version in known if isinstance(version, str)}


def _commit(facts: Mapping[str, Any]) -> tuple[str, bool] | None:
    """Returns the commit of a run, and whether its files differed; None if it is unknown."""
    git = facts.get("git")
    if not isinstance(git, dict) or not isinstance(git.get("commit"), str):
        return None
    return git["commit"], bool(git.get("dirty"))


def _repeat(summary: Summary) -> str:
    """Returns the commands that repeat a run: its code, its packages, its program."""
    facts = read_mapping(RunDirectory.open(summary.path), "env.json")
    lines, commit, packages = [], _commit(facts), _packages(facts)
    if commit:
        lines.append(f"git checkout {commit[0]}")
        lines += ["# some files had uncommitted changes"] if commit[1] else []
    if packages:
        pinned = [shlex.quote(f"{name}=={version}") for name, version in packages.items()]
        lines.append(f"pip install {' '.join(pinned)}  # Python {facts.get('python')}")
    program = summary.command.partition(" ")[0]
    if summary.command:
        lines.append(f"python {summary.command}" if program.endswith(".py") else summary.command)
    return "\n".join(lines)


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


def _read(file: Path) -> str:
    return file.read_text("utf-8", errors="replace") if file.is_file() else ""


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)

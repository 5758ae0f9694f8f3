"""What `make soak` looks for, it finds: on samples and logs made up here."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PATH = Path(__file__).with_name("soak.py")


def load() -> Any:
    spec = importlib.util.spec_from_file_location("soak", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


soak = load()


def legs(count: int = 3, **per_step: float) -> list[list[Any]]:
    """Returns the samples of legs of 200 epochs, with what grows by this much in each step."""
    rng, levels = np.random.default_rng(0), {"resident": 270e6, "blocks": 6e5}
    levels |= {"files": 9.0, "threads": 25.0}

    def sample(step: int) -> Any:
        values = {
            name: int(level + per_step.get(name, 0) * step + (rng.normal() * level / 1e4))
            for name, level in levels.items()
        }
        return soak.Sample(step=step, seconds=step / 800, folders=4, ahead=1.0, **values)

    steps = range(soak.STEPS_PER_EPOCH, 200 * soak.STEPS_PER_EPOCH + 1, soak.STEPS_PER_EPOCH)
    return [[sample(step) for step in steps] for _ in range(count)]


def failed(checks: Any) -> list[str]:
    return [check.what for check in checks if not check.is_good]


def test_flat_run_passes():
    assert failed(soak.of_memory(legs())) == failed(soak.of_handles(legs())) == []


@pytest.mark.parametrize(
    ("leak", "found"),
    [
        ({"resident": 300}, "resident memory, per 1,000 steps"),
        ({"resident": 80}, "resident memory, in the leg that grew most"),
        ({"blocks": 0.25}, "blocks of Python's allocator, per step"),
        ({"files": 2 / soak.STEPS_PER_EPOCH}, "files, second half of a leg"),
        ({"threads": 1 / 10 / soak.STEPS_PER_EPOCH}, "threads, second half of a leg"),
    ],
)
def test_leak_is_found(leak, found):
    grown = legs(**leak)
    assert found in failed([*soak.of_memory(grown), *soak.of_handles(grown)])


def test_what_grows_from_leg_to_leg_is_found():
    first, second, third = legs()
    third = [each._replace(resident=each.resident * 1.15) for each in third]
    assert failed(soak.of_memory([first, second, third])) == ["resident memory, second leg to last"]


def test_batches_that_no_thread_got_and_folders_that_stay_are_found():
    grown = [[each._replace(ahead=0.2, folders=9) for each in leg] for leg in legs()]
    assert len(failed(soak.of_handles(grown))) == 2


def left(root: Path, step: int) -> list[dict[str, Any]]:
    """Writes what a good run leaves behind, and returns the lines of its log."""
    run = root / soak.RUN
    for name in (1, 2, step):
        (run / "checkpoints" / f"step_{name:08d}").mkdir(parents=True)
    (run / "status.json").write_text(json.dumps({"step": step}))
    lines = []
    for window in soak.windows_until(step):
        lines.append({"step": window, "step/loss": 1.0})
        if window % soak.STEPS_PER_EPOCH == 0:
            lines.append({"step": window, "train/loss": 1.0})
    write(root, lines)
    return lines


def write(root: Path, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (root / soak.RUN / "metrics.jsonl").write_text(text)
    rows = "".join(f"{line['step']},1.0\n" for line in lines)
    (root / "metrics.csv").write_text("step,loss\n" + rows)


@pytest.mark.parametrize("step", [2000, 2 * soak.STEPS_PER_EPOCH, 5000])
def test_log_with_each_line_once_passes(step, tmp_path):
    left(tmp_path, step)
    assert failed(soak.of_files(tmp_path)) == []


@pytest.mark.parametrize("change", ["gap", "twice", "order", "behind"])
def test_log_with_a_gap_or_a_line_twice_is_found(change, tmp_path):
    lines = left(tmp_path, 3000)
    at = 5
    changed = {
        "gap": [*lines[:at], *lines[at + 1 :]],
        "twice": [*lines[:at], lines[at], *lines[at:]],
        "order": [*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]],
        "behind": lines[:-1],
    }
    write(tmp_path, changed[change])
    assert failed(soak.of_files(tmp_path)) == ["lines of steps, to step"]


def test_checkpoint_that_was_left_behind_is_found(tmp_path):
    left(tmp_path, 3000)
    (tmp_path / soak.RUN / "checkpoints" / "step_00000003.saving").mkdir()
    assert failed(soak.of_files(tmp_path)) == ["checkpoints in the end"]

"""Runs that are killed or asked to end, at any moment, and started again: they end as one run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from distaff import data, tasks, zoo
from distaff.checkpoint import CheckpointStore
from distaff.errors import CheckpointError, RunDirectoryError

# Orbax is to read what a checkpoint says of itself.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")

SCRIPT = Path(__file__).with_name("resumed_run.py")
SEEDS = range(int(os.environ.get("DISTAFF_CHAOS_RUNS", "1")))  # `make chaos` asks for more
SHORT = len(SEEDS) == 1
NUM_KILLS, NUM_TERMS = (2, 2) if SHORT else (4, 3)
STEPS_PER_CALL = [4, "auto"] if SHORT else [1, 4, "auto"]


def start(root: Path, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(root), json.dumps(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output.splitlines()[-1]


def ended(root: Path, **options: Any) -> dict[str, Any]:
    """Runs to the end, and returns all that a run leaves behind, but for times."""
    return left(root, finish(start(root, **options)))


def left(root: Path, last_line: str) -> dict[str, Any]:
    (run,) = (root / "run").iterdir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["time"]
    files = {path.name: path.read_text() for path in sorted((run / "metrics").iterdir())}
    return {"last": last_line, "log": lines, "files": files, "arrays": arrays_of(run)}


def arrays_of(run: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of all checkpoints that are kept, by step and name, read by Orbax."""
    found = {}
    for folder in sorted((run / "checkpoints").glob("step_????????")):
        for path, leaf in jax.tree.leaves_with_path(ocp.load(str(folder))):
            if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            found[folder.name + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


def assert_equal(found: dict[str, Any], clean: dict[str, Any]) -> None:
    assert found["last"] in (clean["last"], "")
    assert found["log"] == clean["log"]
    assert found["files"] == clean["files"]
    # Killed between two removals, and with nothing left to save, a run keeps one too many.
    assert set(found["arrays"]) >= set(clean["arrays"])
    for name, array in clean["arrays"].items():
        np.testing.assert_array_equal(found["arrays"][name], array, err_msg=name)


@pytest.fixture(scope="module", params=STEPS_PER_CALL, ids=lambda k: f"k{k}")
def clean(request: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Returns what a run leaves that nobody interrupts, and its options."""
    options = {"steps_per_call": request.param}
    root = tmp_path_factory.mktemp("clean")
    return {**ended(root, **options), "options": options}


def moments(rng: random.Random, process: Any, root: Path) -> None:
    """Waits for a random moment, most often one of saving or pruning."""
    folder = root / "run" / "0001" / "checkpoints"
    kind = rng.choice(["any", "saving", "saving", "pruning"])
    assert process.stdout.readline() in ("training\n", "")
    deadline = time.monotonic() + rng.uniform(0.0, 1.5)
    suffix = {"any": "none", "saving": "saving", "pruning": "expired"}[kind]
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if any(name.endswith(suffix) for name in os.listdir(folder)):
                time.sleep(rng.uniform(0, 0.01))
                return
        except OSError:
            pass


def interrupted(
    root: Path, seed: int, number: int, stop: Callable[[Any], None], **options: Any
) -> Iterator[int]:
    """Starts a run and stops it, again and again; yields each return code."""
    rng = random.Random(f"{seed} {number}")
    for _ in range(number):
        process = start(root, **options)
        moments(rng, process, root)
        stop(process)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode <= 0, errors
        yield process.returncode
        if status(root)["status"] == "finished":
            return


def status(root: Path) -> dict[str, Any]:
    file = root / "run" / "0001" / "status.json"
    return json.loads(file.read_text()) if file.exists() else {"status": "running"}


def went_on_to_its_end(root: Path, **options: Any) -> dict[str, Any]:
    """Starts a run for the last time, unless it was told to end when it was about to."""
    if status(root)["status"] == "finished":
        return left(root, "")
    return ended(root, **options)


@pytest.mark.slow_but("k4-0")
@pytest.mark.parametrize("seed", SEEDS)
def test_killed_again_and_again_it_ends_as_a_run_that_never_was(
    clean: dict[str, Any], seed: int, tmp_path: Path
) -> None:
    codes = list(interrupted(tmp_path, seed, NUM_KILLS, lambda p: p.kill(), **clean["options"]))
    assert set(codes) <= {-signal.SIGKILL, 0}
    assert -signal.SIGKILL in codes
    assert_equal(went_on_to_its_end(tmp_path, **clean["options"]), clean)


@pytest.mark.slow
def test_killed_run_with_averages_of_weights_ends_as_one_that_never_was(tmp_path: Path) -> None:
    options = {"steps_per_call": 4, "ema": 0.95, "swa_from_epoch": 3}
    clean, root = ended(tmp_path / "clean", **options), tmp_path / "killed"
    assert any("'averages'" in name and "'swa'" in name for name in clean["arrays"])
    codes = list(interrupted(root, 1, NUM_KILLS, lambda p: p.kill(), **options))
    assert -signal.SIGKILL in codes
    assert_equal(went_on_to_its_end(root, **options), clean)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_asked_to_end_it_saves_and_ends_as_a_run_that_never_was(
    clean: dict[str, Any], seed: int, tmp_path: Path
) -> None:
    steps = []
    for code in interrupted(tmp_path, seed, NUM_TERMS, lambda p: p.terminate(), **clean["options"]):
        assert code in (-signal.SIGTERM, 0)
        found = status(tmp_path)
        steps.append(found["step"])
        assert found["status"] in ("finished", "interrupted")
    assert steps == sorted(steps)
    assert_equal(went_on_to_its_end(tmp_path, **clean["options"]), clean)


@pytest.mark.slow
def test_loader_that_forgets_its_position_is_found_out(tmp_path: Path) -> None:
    options = {"steps_per_call": 4, "forget": True}
    whole, root = ended(tmp_path / "clean", **options), tmp_path / "killed"
    process = start(root, **options)
    checkpoints = root / "run" / "0001" / "checkpoints"
    while not list(checkpoints.glob("step_????????")):
        assert process.poll() is None
        time.sleep(0.001)
    process.terminate()
    process.communicate(timeout=60)
    with pytest.raises(AssertionError):
        assert_equal(ended(root, **options), whole)


def trained(root: Path, *, epochs: int, features: int = 4, **options: Any) -> Any:
    """Trains the model of the fixtures, two steps per epoch."""
    x = np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3)
    loader = data.ArrayLoader({"x": x, "label": np.arange(8) % 2}, 4)
    options = {"root": str(root), "enable_progress_bar": False, **options}
    trainer = tasks.Classifier(zoo.MLP((features, 2)), **options)
    return trainer.train_model(loader, loader, num_epochs=epochs)


@pytest.mark.parametrize("name", ["format_1"])
@pytest.mark.slow
def test_run_of_each_format_goes_on(name: str, tmp_path: Path) -> None:
    fixture = Path(__file__).parents[1] / "golden" / "checkpoints" / name
    run = tmp_path / "classifier" / "0001"
    shutil.copytree(fixture, run)
    (run / "status.json").write_text('{"status": "running"}')
    result = trained(tmp_path, epochs=2)
    assert (result.path, result.step, result.status) == (run, 4, "finished")
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [4, 4]


@pytest.mark.slow
def test_run_goes_on_with_other_options_which_are_named(tmp_path: Path) -> None:
    first = trained(tmp_path, epochs=2)
    (first.path / "status.json").write_text('{"status": "interrupted"}')
    with pytest.raises(CheckpointError, match=r"options.seed: 42 -> 7(.|\n)*allow_changes=True"):
        trained(tmp_path, epochs=3, resume=2, seed=7)
    with pytest.warns(UserWarning, match="with the weights of another run: options.seed"):
        second = trained(tmp_path, epochs=3, resume=2, seed=7, allow_changes=True)
    assert (second.path, second.step) == (first.path, 6)
    log = (first.path / "log.txt").read_text()
    assert "changed: options.seed: 42 -> 7" in log
    assert "changed: num_epochs: 2 -> 3" in log
    assert list((first.path / "checkpoints").glob("step_00000004.abandoned"))
    assert trained(tmp_path, epochs=1).path == first.path.with_name("0002")


@pytest.mark.slow
def test_runs_of_a_sweep_do_not_go_on_from_each_other(tmp_path: Path) -> None:
    first = trained(tmp_path, epochs=1, seed=1)
    (first.path / "status.json").write_text('{"status": "running"}')
    second = trained(tmp_path, epochs=1, seed=2)
    assert second.path == first.path.with_name("0002")
    (second.path / "status.json").write_text('{"status": "running"}')
    again = trained(tmp_path, epochs=2, seed=1, log_every_n_steps=1)
    assert (again.path, again.step) == (first.path, 4)


@pytest.mark.slow
def test_run_that_cannot_go_on_says_why_and_stays_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="resume='must' needs an unfinished run"):
        trained(tmp_path, epochs=1, resume="must")
    run = trained(tmp_path, epochs=2).path
    (run / "status.json").write_text('{"status": "interrupted"}')
    config = (run / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"differs:(.|\n)*model.features"):
        trained(tmp_path, epochs=2, features=5, resume="must")
    with (
        pytest.warns(UserWarning, match="with the weights of another run"),
        pytest.raises(CheckpointError, match="another model"),
    ):
        trained(tmp_path, epochs=2, features=5, resume="must", allow_changes=True)
    with pytest.raises(CheckpointError, match="no checkpoint of step 3"):
        trained(tmp_path, epochs=2, resume=3)
    assert (run / "config.json").read_bytes() == config
    assert trained(tmp_path, epochs=2, resume="must").step == 4


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt", "checkpoints", "metrics"])
@pytest.mark.slow
def test_run_does_not_write_where_a_link_leads(name: str, tmp_path: Path) -> None:
    run = trained(tmp_path / "runs", epochs=2).path
    (run / "status.json").write_text('{"status": "interrupted"}')
    outside = (run / name).rename(tmp_path / "outside")
    (run / name).symlink_to(outside)
    before = {path: path.stat().st_mtime_ns for path in (outside, *outside.rglob("*"))}
    with pytest.raises(RunDirectoryError, match="is a link"):
        trained(tmp_path / "runs", epochs=3)
    assert {path: path.stat().st_mtime_ns for path in (outside, *outside.rglob("*"))} == before


@pytest.mark.parametrize(
    "change",
    [
        {"loader": []},
        {"steps_per_call": []},
        {"begun_at": []},
        {"begun_at": [float("inf"), 0]},
        {"best_models": 5},
        {"best_models": [{}]},
        {"last_metrics": [1]},
        {"callbacks": [{}]},
        {"tally": {}},
        {"stop": None},
    ],
)
@pytest.mark.slow
def test_checkpoint_with_hostile_facts_is_refused(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path, epochs=1).path
    (run / "status.json").write_text('{"status": "interrupted"}')
    info = {**CheckpointStore(run / "checkpoints").info(2), **change}
    monkeypatch.setattr(CheckpointStore, "info", lambda self, step: info)
    with pytest.raises(CheckpointError, match="cannot resume from its checkpoint of step 2"):
        trained(tmp_path, epochs=2)


@pytest.mark.slow
def test_run_that_lives_is_left_alone(tmp_path: Path) -> None:
    first = start(tmp_path, steps_per_call=4)
    assert first.stdout is not None
    assert first.stdout.readline() == "training\n"
    first.send_signal(signal.SIGSTOP)
    second = start(tmp_path, steps_per_call=4, resume="must")
    errors = second.communicate(timeout=60)[1]
    first.send_signal(signal.SIGCONT)
    assert f"is in use by process {first.pid}" in errors
    assert second.returncode == 1
    assert finish(first).startswith("finished")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["0001"]

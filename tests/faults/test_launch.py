"""Programs of several trainings, killed and started again: they end as one that never was."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.faults import folds

from distaff.run.identity import launch

SCRIPT = Path(__file__).with_name("folds.py")


def start(root: Path, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(root), json.dumps(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def results(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def run(root: Path, **options: Any) -> list[dict[str, Any]]:
    """Runs the program in this process; one that is killed ends in an error."""
    found = []
    for result, trainer in folds.program(str(root), **options):
        made = folds.summary(result, trainer)
        found.append({**made, "path": result.path.name, "first": result.first_step})
    return found


def killed(root: Path, number: int, **options: Any) -> None:
    """Leaves what a program leaves that is killed in one of its trainings."""
    with pytest.raises(RuntimeError, match="boom"):
        run(root, kill_in=number, how="error", **options)
    newest = max((root / "fold").iterdir())
    status = json.loads((newest / "status.json").read_text())
    assert status["status"] == "failed"
    (newest / "status.json").write_text(json.dumps({**status, "status": "running"}))
    launch._forget()  # as the death of a process lets go of its locks


def bits(found: list[dict[str, Any]]) -> list[Any]:
    return [{n: x for n, x in each.items() if n not in ("path", "first")} for each in found]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Returns the results of a program that nobody interrupts."""
    found = run(tmp_path_factory.mktemp("clean"))
    launch.close_all()
    assert [each["first"] for each in found[:3]] == [0, 0, 0]
    return found


@pytest.fixture(autouse=True)
def other_process() -> Iterator[None]:
    """Ends the launches of a test as the end of its process would."""
    yield
    launch.close_all()


@pytest.mark.parametrize("number", [0, 2, 3])
@pytest.mark.slow
def test_program_that_died_takes_up_its_runs(
    clean: list[dict[str, Any]], number: int, tmp_path: Path
) -> None:
    killed(tmp_path, number)
    found = run(tmp_path)
    assert bits(found) == bits(clean)
    assert [each["path"] for each in found] == ["0001", "0002", "0003", "0004"]
    trained = [each["step"] - each["first"] for each in found]
    assert [n for n in range(4) if not trained[n]] == list(range(number))
    launch.close_all()
    assert not list((tmp_path / ".launches").iterdir())
    again = run(tmp_path)  # after a launch that ended, all of it is trained again
    assert [each["path"] for each in again] == ["0005", "0006", "0007", "0008"]
    assert bits(again) == bits(clean)


@pytest.mark.slow
def test_kill_right_after_the_end_trains_nothing_again(
    clean: list[dict[str, Any]], tmp_path: Path
) -> None:
    run(tmp_path)
    launch._forget()
    found = run(tmp_path)
    assert bits(found) == bits(clean)
    assert [each["first"] for each in found] == [each["step"] for each in found]
    assert len(list((tmp_path / "fold").iterdir())) == 4


@pytest.mark.slow
def test_runs_of_a_program_that_was_changed_are_new(tmp_path: Path) -> None:
    killed(tmp_path, 2)
    found = run(tmp_path, rate=0.03)
    assert [each["path"] for each in found] == ["0004", "0005", "0006", "0007"]
    log = (tmp_path / "fold" / "0005" / "log.txt").read_text()
    assert "0005 is a new run instead of 0002, which was finished at step 12" in log
    assert "optimizer.learning_rate: 0.02 -> 0.03" in log


@pytest.mark.slow
def test_launch_of_a_process_that_lives_is_left_alone(tmp_path: Path) -> None:
    killed(tmp_path, 1)
    (file,) = (tmp_path / ".launches").iterdir()
    other = launch.Launch(tmp_path)
    assert other.adopt(file.stem)
    try:
        found = run(tmp_path)
    finally:
        other.close()
    assert [each["path"] for each in found] == ["0003", "0004", "0005", "0006"]


@pytest.mark.slow
def test_finished_run_without_checkpoints_is_trained_again(
    clean: list[dict[str, Any]], tmp_path: Path
) -> None:
    killed(tmp_path, 1)
    shutil.rmtree(tmp_path / "fold" / "0001" / "checkpoints")
    found = run(tmp_path)
    assert bits(found) == bits(clean)
    assert [each["path"] for each in found] == ["0003", "0002", "0004", "0005"]


@pytest.mark.slow
def test_keys_make_a_command_that_is_repeated_idempotent(
    clean: list[dict[str, Any]], tmp_path: Path
) -> None:
    first = run(tmp_path, keyed=True)
    launch.close_all()
    again = run(tmp_path, keyed=True)
    assert bits(first) == bits(again) == bits(clean)
    assert [each["path"] for each in again] == ["0001", "0002", "0003", "0004"]
    assert [each["first"] for each in again] == [each["step"] for each in again]

    def first_path(**options: Any) -> str:
        return next(folds.program(str(tmp_path), **options))[0].path.name

    assert first_path() == "0005"  # without a key, no run of a key is loaded
    assert first_path(keyed=True, rerun=True) == "0006"
    assert first_path(keyed=True, rate=0.5) == "0007"
    assert first_path(keyed=True) == "0006"


@pytest.mark.slow
def test_program_that_is_killed_in_its_third_training_ends_as_one_that_never_was(
    clean: list[dict[str, Any]], tmp_path: Path
) -> None:
    process = start(tmp_path, kill_in=2)
    process.communicate(timeout=120)
    assert process.returncode == -9
    found = results(start(tmp_path))
    assert bits(found) == bits(clean)
    assert [each["path"] for each in found] == ["0001", "0002", "0003", "0004"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_program_that_is_killed_at_random_ends_as_one_that_never_was(
    clean: list[dict[str, Any]], seed: int, tmp_path: Path
) -> None:
    rng, num_ended = random.Random(seed), 0
    for _ in range(5):
        process = start(tmp_path, how="slow")
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0, 3))
        process.kill()
        process.communicate(timeout=60)
        num_ended += process.returncode == 0  # before it could be killed
    found = results(start(tmp_path))
    assert bits(found) == bits(clean)
    paths = [int(each["path"]) for each in found]
    # A program that has ended in order is trained again as a whole, in versions of its own.
    assert paths == [*range(paths[0], paths[0] + 4)]
    assert paths[0] % 4 == 1
    assert paths[0] > 4 * num_ended

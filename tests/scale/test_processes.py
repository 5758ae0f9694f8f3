"""A run in two processes with two devices each equals the run of one process with four."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tests.scale import ordered_run
from tests.scale.ordered_run import BATCH, NEVER, ROWS, At, interrupt, make, moved, packed, train

from distaff import data
from distaff.execution.feed.chunk import Rows
from distaff.run.identity.launch import close_all

PROGRAM = "from tests.scale import ordered_run; ordered_run.main()"
CHECKOUT = Path(ordered_run.__file__).parents[2]
SECONDS = 240


class Pair(NamedTuple):
    """What two processes have printed.

    Attributes:
        facts: what each has shown, by process.
        text: all output, for a failed assertion.
        codes: how each has ended.
    """

    facts: list[list[dict[str, Any]]]
    text: str
    codes: list[int]
    errors: list[str]


def output(process: subprocess.Popen[str], pair: list[subprocess.Popen[str]]) -> tuple[str, str]:
    """Returns what a process prints. If it is late, both end with the stacks of their threads."""
    try:
        return process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        for each in pair:
            each.send_signal(signal.SIGABRT)
        return process.communicate(timeout=SECONDS)


def run_pair(root: Path, part: str) -> Pair:
    """Runs a part of the script in two processes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(CHECKOUT), *sys.path])}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), address, str(root), part],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for rank in range(2)
    ]
    try:
        ends = [output(process, pair) for process in pair]
    finally:
        for process in pair:
            process.kill()
    lines = [out.splitlines() for out, _ in ends]
    facts = [
        [json.loads(line.removeprefix("facts ")) for line in each if line.startswith("facts ")]
        for each in lines
    ]
    text = "\n".join(f"== process {n} ==\n{out}\n{err}" for n, (out, err) in enumerate(ends))
    return Pair(facts, text, [each.returncode for each in pair], [err for _, err in ends])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of all runs."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def pair(root: Path) -> Pair:
    """Two processes that train and evaluate."""
    return run_pair(root, "first")


@pytest.fixture(scope="module")
def ended(root: Path) -> Pair:
    """Two processes; one of them stops a run, and is then asked to end."""
    return run_pair(root, "second")


def test_two_processes_train_as_one(pair: Pair) -> None:
    assert all(pair.facts), pair.text
    (one,), (other,) = pair.facts
    trainer = make(None, NEVER)
    result = train(trainer, 2)
    loader = data.ArrayLoader(ROWS, BATCH)
    np.testing.assert_allclose(one["loss"], result.history["step/loss"], rtol=2e-6)
    np.testing.assert_array_equal(
        [row["step/order"] for row in rows_of(one["path"])], result.history["step/order"]
    )
    for name, value in result.metrics.items():
        assert one["metrics"][name] == pytest.approx(value, 2e-6), name
    assert one["evaluated"] == pytest.approx(float(trainer.eval_model(loader)["loss"]), 2e-6)
    np.testing.assert_allclose(one["predicted"], trainer.predict(loader), rtol=1e-5, atol=1e-6)
    assert one == {**other, "errors": one["errors"]}
    assert one["parts"] == [BATCH // 4]  # of one device


def test_first_process_measures_a_form_that_all_use(pair: Pair) -> None:
    (one,), (other,) = pair.facts
    fresh, again = one["measured"]
    assert other["measured"] == one["measured"]
    assert (fresh["why"], fresh["num_steps"]) == ("measured", 6)
    assert again == {**fresh, "why": "remembered"}


def test_first_save_is_read_back_by_all(pair: Pair) -> None:
    for rank in range(2):
        assert "reading 'params' back gives other values" in pair.facts[rank][0]["tampered"]


def rows_of(path: str) -> list[dict[str, Any]]:
    """Returns the logged windows of a run."""
    lines = (Path(path) / "metrics.jsonl").read_text("utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "step/loss" in row]


def test_first_process_alone_writes_the_run(pair: Pair, root: Path) -> None:
    path = Path(pair.facts[0][0]["path"])
    assert sorted(each.name for each in (root / "whole").iterdir()) == ["0001"]
    steps = [row["step"] for row in rows_of(str(path))]
    assert steps == list(range(1, 13))
    assert (path / "log.txt").read_text("utf-8").count("4 cpu devices: fsdp=4") == 1
    assert json.loads((path / "status.json").read_text())["status"] == "finished"
    assert pair.text.count("4 cpu devices: fsdp=4") == 1
    assert pair.codes == [0, 0], pair.text


def test_what_needs_one_process_is_an_error_in_all(pair: Pair) -> None:
    for rank in range(2):
        plain, debug, order, shard = pair.facts[rank][0]["errors"]
        assert f"jax.process_count() is 2 (this is process {rank})" in plain
        assert 'pass mesh="dp" or mesh="fsdp" to train one model in all of them' in plain
        assert "A run with debug=True runs in one process" in debug
        assert "a Stream, does not promise that. Use data.ArrayLoader" in order
        assert f"Process {rank} and process {1 - rank} have read different batches" in shard


@pytest.mark.slow
def test_callback_of_one_process_stops_both(ended: Pair) -> None:
    assert all(ended.facts), ended.text
    (one,), (other,) = ended.facts
    assert one == other
    assert (one["status"], one["reason"]) == ("stopped", "enough")
    assert 9 <= one["step"] < 600


@pytest.mark.slow
def test_sigterm_to_one_process_ends_both_at_one_step(ended: Pair, root: Path) -> None:
    assert ended.codes == [-signal.SIGTERM] * 2, ended.text
    status = json.loads((root / "moved" / "0001" / "status.json").read_text())
    assert (status["status"], status["reason"]) == ("interrupted", "SIGTERM")
    assert 9 <= status["step"] < 180
    saved = sorted((root / "moved" / "0001" / "checkpoints").iterdir())
    assert saved[-1].name == f"step_{status['step']:08d}"


@pytest.mark.slow
def test_run_moves_from_two_processes_to_one_and_back(ended: Pair, root: Path) -> None:
    assert ended.codes == [-signal.SIGTERM] * 2, ended.text
    whole = moved(None, NEVER, NEVER)
    with pytest.raises(KeyboardInterrupt):
        moved(root, NEVER, At(150, interrupt))
    close_all()  # as the end of this process does: it no longer has the run
    again = run_pair(root, "third")
    assert all(again.facts), again.text
    (one, sequences), (other, same_sequences) = again.facts
    assert one == other
    assert one["status"] == "finished"
    assert one["first_step"] > 18
    assert one["path"] == str(root / "moved" / "0001")
    rows = rows_of(one["path"])
    np.testing.assert_array_equal([row["step/order"] for row in rows], whole.history["step/order"])
    np.testing.assert_allclose(
        [row["step/loss"] for row in rows], whole.history["step/loss"], rtol=2e-6
    )
    assert sequences == same_sequences
    np.testing.assert_allclose(sequences["packed"], packed(None)["packed"], rtol=2e-6)
    # The process that fails shows its error last; the other one does not wait for it.
    assert again.codes[1] == 1, again.text
    assert again.codes[0] != 0, again.text
    assert "ValueError: broken" in again.errors[1]


def test_rows_are_those_of_the_array() -> None:
    array, index = np.arange(40).reshape(10, 4), np.array([[7, 1, 5], [2, 2, 9]])
    rows = Rows(array, index)
    assert (rows.shape, rows.dtype) == ((2, 3, 4), array.dtype)
    part = (slice(None), slice(1, 3), slice(0, 2))
    np.testing.assert_array_equal(rows[part], array[index][part])

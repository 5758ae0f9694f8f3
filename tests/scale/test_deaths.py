"""One of two processes ends: the other one ends soon, and the next start resumes bit for bit."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from tests.scale import dying_run

import distaff.cli
from distaff import History
from distaff.checkpoint import CheckpointStore, arrays
from distaff.cli.launch import launcher

CHECKOUT = Path(dying_run.__file__).parents[2]
RUN = Path("runs", "dying", "0001")
LAUNCH = ("launch", "--processes", "2", "--devices-per-process", "2", "--logs", "logs")


class Launched(NamedTuple):
    """A launch that has ended.

    Attributes:
        status: its exit status.
        lines: the time of each of its own lines, and the line.
    """

    status: int
    lines: list[tuple[float, str]]

    @property
    def failure(self) -> str:
        """What it has said of the first process that failed, with the end of its log."""
        return self.lines[1][1]

    @property
    def seconds(self) -> float:
        """Time from the end of this process until the other one had ended."""
        return self.lines[1][0] - float(dying_run.ENDED.read_text())


def launch(patch: pytest.MonkeyPatch, where: str, *words: str) -> Launched:
    """Launches the run. After a failure, the launcher lets the other process end by itself."""
    lines: list[tuple[float, str]] = []
    patch.setattr(launcher, "_say", lambda text: lines.append((time.time(), text)))
    patch.setenv("PYTHONPATH", os.pathsep.join([str(CHECKOUT), *sys.path]))
    script = dying_run.__file__
    status = distaff.cli.main((*LAUNCH, "--grace", "60s", *words, script, where))
    return Launched(status, lines)


class Facts(NamedTuple):
    """What a run has left: the losses and orders of all steps, and the bits of all arrays."""

    history: dict[str, list[Any]]
    arrays: dict[str, bytes]


def bits(leaf: jax.Array) -> bytes:
    """Returns the bits of an array, or of a random key."""
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()


def facts() -> Facts:
    """Returns what the run has left in the working directory."""
    history = History.read(RUN)
    store = CheckpointStore(RUN / "checkpoints")
    step = store.latest()
    assert step == 36
    stored = arrays.metadata(store.directory / f"step_{step:08d}")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(stored))
    leaves = jax.tree.leaves_with_path(store.load(step, shapes))
    found = {jax.tree_util.keystr(path): bits(leaf) for path, leaf in leaves}
    names = "step/loss", "step/order", "val/loss"
    return Facts({name: list(map(float, history[name])) for name in names}, found)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """A run of two processes that nothing happens to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("undisturbed"))
        assert launch(patch, "never").status == 0
        found = facts()
    assert len(found.history["step/loss"]) == 36
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "index", "most_seconds"),
    [
        ("step", 1, 2),  # the other one waits for a result
        ("callback", 1, 12),  # the other one is in the code of the host, as long as it likes
        ("loader", 1, 12),
        ("save", 1, 12),  # the other one waits at a barrier
        ("coordinator", 0, 5),
    ],
)
def test_kill_of_a_process_ends_the_other_and_loses_no_bit(
    where, index, most_seconds, undisturbed, monkeypatch, capfd
):
    done = launch(monkeypatch, where, "--restarts", "1")
    assert f"process {index} of 2 failed first (killed by SIGKILL)" in done.failure
    assert done.seconds < most_seconds
    assert done.lines[2][1] == "starting all processes again: restart 1 of 1"
    assert done.status == 0
    assert "from its checkpoint of step" in capfd.readouterr().out
    assert facts() == undisturbed


@pytest.mark.slow
def test_sigterm_to_a_process_stops_both_at_one_step(undisturbed, monkeypatch, capfd):
    done = launch(monkeypatch, "terminate")
    assert done.status == 143
    assert "was stopped (killed by SIGTERM)" in done.failure
    last = {Path(f"last-{index}").read_text() for index in (0, 1)}
    assert len(last) == 1
    (step,) = map(int, last)
    assert 9 <= step < 36
    assert f"interrupted by SIGTERM at step {step}." in capfd.readouterr().out
    assert launch(monkeypatch, "terminate").status == 0
    assert facts() == undisturbed


def test_error_of_a_process_is_shown_last_and_ends_the_other(monkeypatch, capfd):
    done = launch(monkeypatch, "error")
    assert done.status == 1
    assert "process 1 of 2 failed first (exit status 1)" in done.failure
    assert done.failure.endswith("\n  ValueError: broken")
    assert done.seconds < 3

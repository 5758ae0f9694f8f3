"""Watchdog: a stall is written once, with stacks; a healthy run is not disturbed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

import distaff
from distaff.checkpoint import CheckpointStore
from distaff.errors import ConfigError
from distaff.run.supervision.watchdog import Watchdog
from line import Line, loader


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def hang_in_here(event: threading.Event) -> None:
    event.wait(20.0)


def test_stall_is_written_once_with_the_stacks_of_all_threads(tmp_path, capfd):
    log, release = tmp_path / "log.txt", threading.Event()
    log.write_text("before\n")
    thread = threading.Thread(target=hang_in_here, args=(release,))
    thread.start()
    with Watchdog(0.2, path=log) as watchdog:
        watchdog.beat("waiting for data", 41)
        wait_for(lambda: "test_watchdog.py" in log.read_text())
        time.sleep(0.5)
        text = log.read_text()
        watchdog.beat("a step", 42)
        wait_for(lambda: "continues, after" in log.read_text())
        assert text.startswith("before\n")
        assert text.count("seems stuck") == 1
        assert re.search(r"at step 41, waiting for data has taken \d+ s so far", text)
        assert f"Process 0 ({os.getpid()} on " in text
        assert "hang_in_here" in text
        assert "test_stall_is_written_once" in text
        wait_for(lambda: log.read_text().count("seems stuck") == 2)  # the next stall
    release.set()
    thread.join()
    assert "at step 42, a step has taken" in log.read_text()
    assert capfd.readouterr().err.count("seems stuck") == 2


def test_stall_is_written_to_stderr_where_there_is_no_file(capfd):
    with Watchdog(0.1) as watchdog:
        watchdog.beat("a step", 1)
        time.sleep(0.4)
    err = capfd.readouterr().err
    assert "at step 1, a step has taken" in err
    assert "test_stall_is_written_to_stderr" in err


def test_healthy_run_writes_nothing(tmp_path, capfd):
    log = tmp_path / "log.txt"
    with Watchdog("1s", path=log) as watchdog:
        for step in range(75):
            watchdog.beat("a step", step)
            time.sleep(0.02)
    assert not log.exists()
    assert capfd.readouterr().err == ""


def test_patience_allows_for_more(capfd):
    with Watchdog(0.1) as watchdog:
        watchdog.beat("compiling", 0, patience=100.0)
        time.sleep(0.4)
    assert capfd.readouterr().err == ""


def test_start_may_take_as_long_as_compiling(capfd):
    with Watchdog(0.2):
        time.sleep(0.6)
    assert capfd.readouterr().err == ""


def watchdogs() -> int:
    return sum(thread.name == "distaff-watchdog" for thread in threading.enumerate())


def test_thread_ends_with_the_run_and_may_begin_again():
    watchdog = Watchdog("1h")
    for _ in range(2):
        with watchdog:
            assert watchdogs() == 1
        assert watchdogs() == 0


def test_none_watches_nothing():
    with Watchdog(None) as watchdog:
        watchdog.beat("a step", 1)
        assert watchdogs() == 0


def test_stuck_after_is_checked():
    with pytest.raises(ConfigError, match="stuck_after must be a positive duration"):
        Watchdog(0)


def test_thread_keeps_no_process_alive():
    code = (
        "from distaff.run.supervision.watchdog import Watchdog; "
        "Watchdog('1h').__enter__(); print('end')"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert (finished.returncode, finished.stdout) == (0, "end\n"), finished.stderr


class Watched(Line):
    """Notes how many watchdogs there are when its loss is traced."""

    def __init__(self, **options):
        super().__init__(**options)
        self.num_watchdogs: set[int] = set()

    def loss_fn(self, params, batch, ctx):
        self.num_watchdogs.add(watchdogs())
        return super().loss_fn(params, batch, ctx)


def test_each_part_of_a_run_has_a_deadline_of_its_own(monkeypatch):
    found: dict[str, set[tuple[str, float]]] = {"save": set(), "load": set(), "step": set()}

    def note(where: str) -> None:
        what, _, patience = trainer.last_run.supervisor._watchdog.latest
        found[where].add((what, patience))

    def noting(name: str) -> None:
        function = getattr(CheckpointStore, name)

        def noted(self, *args, **options):
            note(name)
            return function(self, *args, **options)

        monkeypatch.setattr(CheckpointStore, name, noted)

    class Stops(distaff.Callback):
        def on_step_end(self, info):
            note("step")
            if info.step == 7 and len(found["save"]) and not found["load"]:
                raise KeyboardInterrupt

    noting("save")
    noting("load")
    trainer = Watched(callbacks=[Stops()], save_every="3 steps")
    with pytest.raises(KeyboardInterrupt):
        trainer.train_model(loader(), num_epochs=2)
    trainer = Watched(callbacks=[Stops()], save_every="3 steps")
    assert trainer.train_model(loader(), num_epochs=2).first_step == 6
    assert found["save"] == {("a checkpoint", 3.0)}
    assert found["load"] == {("the restore of a checkpoint", 3.0)}
    # The first step after a save has the patience of a step again.
    assert found["step"] == {("the first step of an epoch", 6.0), ("a step", 1.0)}
    assert trainer.num_watchdogs == {1}  # from the first trace on
    assert watchdogs() == 0

"""Run lock: one run at a time per directory, whatever its process dies of."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.errors import RunDirectoryError, RunInUseError
from distaff.run.directory import run_lock
from distaff.run.directory.process import this_process
from distaff.run.directory.run_lock import LOCK_FILE, Holder, locked

# Imports what the lock needs, and no more: twenty processes that import JAX take a minute.
PROLOGUE = """
import importlib.util, logging, os, sys, types
from pathlib import Path
import importlib
package = types.ModuleType("distaff"); package.__path__ = [sys.argv[2]]
sys.modules["distaff"] = package
logging.basicConfig(level="WARNING")
from distaff.run.directory import run_lock
if sys.argv[3] == "without flock":
    run_lock.fcntl = None
"""
HOLD = """
try:
    with run_lock.locked(Path(sys.argv[1])):
        print("held", os.getpid(), flush=True)
        sys.stdin.readline()
except run_lock.RunInUseError as error:
    print("refused", error, flush=True)
"""
HOLD_WITH_A_FORK = """
with run_lock.locked(Path(sys.argv[1])):
    if os.fork() == 0:
        print("forked", os.getpid(), flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(params=["with flock", "without flock"])
def way(request, monkeypatch):
    """How the file system keeps two apart."""
    if request.param == "without flock":
        monkeypatch.setattr(run_lock, "fcntl", None)
    return request.param


@pytest.fixture
def start(tmp_path):
    """Starts a process that takes the lock; `stdout` tells whether it got it."""
    started = []

    def start(way="with flock", body=HOLD):
        source = str(Path(run_lock.__file__).parents[2])
        process = subprocess.Popen(
            [sys.executable, "-c", PROLOGUE + body, str(tmp_path), source, way],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def left_by(directory, **changes):
    """Leaves a lock behind, as a process that was killed does."""
    holder = Holder(**{**this_process(), "since": "2026-01-01T00:00:00+00:00", **changes})
    (directory / LOCK_FILE).write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def test_second_process_is_refused_with_the_name_of_the_first(tmp_path, start, way):
    first = start(way)
    assert first.stdout.readline() == f"held {first.pid}\n"
    with pytest.raises(RunInUseError, match="Wait until it ends") as caught, locked(tmp_path):
        pass
    holder = json.loads((tmp_path / LOCK_FILE).read_text())
    for part in (str(first.pid), holder["host"], holder["since"], repr(str(tmp_path))):
        assert part in str(caught.value)
    assert isinstance(caught.value, RunDirectoryError)
    first.communicate("\n")
    assert first.returncode == 0
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


def test_lock_of_a_killed_process_is_taken_over_and_the_log_says_so(tmp_path, start, way, caplog):
    first = start(way)
    first.stdout.readline()
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert (tmp_path / LOCK_FILE).exists()
    with caplog.at_level(logging.WARNING), locked(tmp_path):
        pass
    assert f"taken over from process {first.pid}" in caplog.text
    assert "and is dead" in caplog.text
    assert os.listdir(tmp_path) == []


def test_lock_of_a_killed_process_that_nobody_has_reaped_is_taken_over(tmp_path, start, way):
    first = start(way)
    first.stdout.readline()
    os.kill(first.pid, signal.SIGKILL)
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
    with locked(tmp_path):
        assert run_lock._read(tmp_path / LOCK_FILE).started == this_process()["started"]


@pytest.mark.slow
def test_one_of_twenty_racing_processes_gets_the_lock(tmp_path, start):
    # A dead process's lock makes the race harder: all want to take it over.
    left_by(tmp_path, pid=2**22 + 1, started=1)
    racers = [start() for _ in range(20)]
    said = [racer.stdout.readline().split() for racer in racers]
    [(_, winner)] = [words for words in said if words[0] == "held"]
    refused = [words for words in said if words[0] == "refused"]
    assert len(refused) == 19
    assert all("process" in words for words in refused)
    assert all(winner in words for words in refused)


def test_twenty_racing_threads_hold_the_lock_one_after_the_other(tmp_path, way):
    barrier = threading.Barrier(20)
    inside = []
    got = []

    def race(number):
        barrier.wait()
        for _ in range(10):
            with contextlib.suppress(RunInUseError), locked(tmp_path):
                inside.append(number)
                assert inside == [number]
                time.sleep(0.001)
                assert inside == [number]
                inside.clear()
                got.append(number)

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(race, range(20)))
    assert got
    assert os.listdir(tmp_path) == []


def test_lock_on_a_file_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    flock, seen = run_lock._flock, []

    def release_first(path, descriptor):
        seen.append(path)
        if len(seen) == 1:
            path.unlink()
        return flock(path, descriptor)

    monkeypatch.setattr(run_lock, "_flock", release_first)
    with locked(tmp_path):
        assert run_lock._read(tmp_path / LOCK_FILE).pid == os.getpid()
    assert len(seen) == 2


def test_refusal_waits_for_the_name_of_a_holder_that_is_just_starting(tmp_path):
    path = tmp_path / LOCK_FILE
    left_by(tmp_path, pid=2**22 + 1, started=1)
    with path.open("r+b") as file:
        run_lock.fcntl.flock(file, run_lock.fcntl.LOCK_EX)
        naming = threading.Timer(0.2, run_lock._write, (file.fileno(),))
        naming.start()
        with pytest.raises(RunInUseError, match=f"process {os.getpid()} on"), locked(tmp_path):
            pass
        naming.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_does_not_keep_the_lock_of_its_killed_parent(tmp_path, start, way):
    parent = start(way, HOLD_WITH_A_FORK)
    child = int(parent.stdout.readline().split()[1])
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    os.kill(child, 0)  # it lives
    with locked(tmp_path):
        assert run_lock._read(tmp_path / LOCK_FILE).started == this_process()["started"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_that_leaves_the_block_does_not_release_the_lock(tmp_path, way):
    with locked(tmp_path):
        before = (tmp_path / LOCK_FILE).read_bytes()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a fork beside threads, as data loaders do it
                child = os.fork()
            if child == 0:
                sys.exit()
        except SystemExit:
            pass
        if child:
            os.waitpid(child, 0)
            assert (tmp_path / LOCK_FILE).read_bytes() == before
            with pytest.raises(RunInUseError), locked(tmp_path):
                pass
    if child == 0:
        os._exit(0)


def test_started_program_does_not_keep_the_lock(tmp_path):
    with locked(tmp_path):
        program = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with locked(tmp_path):
            assert run_lock._read(tmp_path / LOCK_FILE).started == this_process()["started"]
    finally:
        program.communicate(b"\n")


def test_block_that_raises_releases_the_lock(tmp_path, way):
    for _ in range(2):
        with contextlib.suppress(KeyError), locked(tmp_path):
            raise KeyError
    assert os.listdir(tmp_path) == []


def test_lock_of_another_machine_is_in_use_while_it_holds_it(tmp_path):
    left_by(tmp_path, host="node7", system="another", pid=1)
    with (tmp_path / LOCK_FILE).open("r+b") as file:
        run_lock.fcntl.flock(file, run_lock.fcntl.LOCK_EX)
        with pytest.raises(RunInUseError, match="process 1 on 'node7'"), locked(tmp_path):
            pass


def test_lock_that_another_machine_does_not_hold_is_taken_over(tmp_path, way, caplog):
    holder = left_by(tmp_path, host="node7", system="another")
    with locked(tmp_path):
        assert run_lock._read(tmp_path / LOCK_FILE).host == this_process()["host"]
    assert f"taken over from process {holder.pid} on node7" in caplog.text
    assert "and holds no lock visible to this machine" in caplog.text
    assert ("Start one at a time" in caplog.text) is (way == "without flock")


def test_process_id_that_was_given_again_is_not_the_holder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "fcntl", None)
    left_by(tmp_path, started=1)
    with locked(tmp_path):
        assert run_lock._read(tmp_path / LOCK_FILE).started == this_process()["started"]


def test_lock_without_flock_knows_the_processes_of_this_machine(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    with locked(tmp_path):
        with pytest.raises(RunInUseError, match=f"process {os.getpid()}"), locked(tmp_path):
            pass
        assert os.listdir(tmp_path) == [LOCK_FILE]
    assert "start at the same time or on two machines are not detected" in caplog.text


def test_lock_is_not_writable_by_everybody(tmp_path, way):
    previous = os.umask(0)
    try:
        with locked(tmp_path):
            assert not (tmp_path / LOCK_FILE).stat().st_mode & stat.S_IWOTH
    finally:
        os.umask(previous)


def test_lock_does_not_follow_a_link(tmp_path, way):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / LOCK_FILE).symlink_to(precious)
    with pytest.raises(RunDirectoryError, match=LOCK_FILE), locked(tmp_path):
        pass
    assert precious.read_text() == "mine"


def test_lock_names_a_directory_it_cannot_write(tmp_path, way):
    with (
        pytest.raises(RunDirectoryError, match=r"nowhere.*Check the path"),
        locked(tmp_path / "nowhere"),
    ):
        pass


@settings(deadline=None, max_examples=int(os.environ.get("DISTAFF_FUZZ_EXAMPLES", "200")))
@given(
    content=st.binary(max_size=40)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=5,
    ).map(lambda value: json.dumps(value).encode())
    | st.fixed_dictionaries(
        {
            name: st.none() | st.integers() | st.text(max_size=5) | st.lists(st.text(max_size=5))
            for name in Holder.__annotations__
        }
    ).map(lambda value: json.dumps(value).encode())
)
def test_lock_file_of_any_content_is_taken(tmp_path_factory, content):
    directory = tmp_path_factory.getbasetemp()
    (directory / LOCK_FILE).write_bytes(content)
    with locked(directory):
        assert run_lock._read(directory / LOCK_FILE).pid == os.getpid()
    assert not (directory / LOCK_FILE).exists()

"""The version of a new run: its own, and one that was left empty is used again."""

from __future__ import annotations

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Barrier

from distaff.run.directory.run_directory import RunDirectory
from distaff.run.directory.run_lock import locked
from distaff.run.directory.run_version import reserve


def begun(root, lock):
    """Begins a run, as far as its status; returns its directory."""
    directory = RunDirectory(root, "digits")
    reserve(directory, lock)
    directory.set_status("running")
    return directory.path


def test_version_that_a_killed_run_left_empty_is_used_again(tmp_path):
    parent = tmp_path / "digits"
    for version in ("0001", "0002"):
        (parent / version).mkdir(parents=True)
    (parent / "0001" / "config.json").write_text("{}")
    (parent / "0001" / ".status.json.ab.tmp").write_text("{")
    with ExitStack() as lock:
        assert begun(tmp_path, lock) == parent / "0001"
        assert sorted(os.listdir(parent / "0001")) == ["run.lock", "status.json"]
        with ExitStack() as other:
            assert begun(tmp_path, other) == parent / "0002"
            assert begun(tmp_path, other) == parent / "0003"


def test_version_with_anything_of_a_run_in_it_stays(tmp_path):
    for version, name in enumerate(("metrics.jsonl", "checkpoints", "notes.txt"), 1):
        (tmp_path / "digits" / f"{version:04d}" / name).mkdir(parents=True)
        with ExitStack() as lock:
            reserve(directory := RunDirectory(tmp_path, "digits"), lock)
            assert directory.path.name == f"{version + 1:04d}"
        directory.path.rmdir()


def test_version_that_another_run_has_just_made_is_left_to_it(tmp_path):
    made = RunDirectory(tmp_path, "digits").create()
    with locked(made), ExitStack() as lock:
        assert begun(tmp_path, lock).name == "0002"
    lock_file = made / "run.lock"
    with locked(made):
        holder = json.loads(lock_file.read_text())
    lock_file.write_text(json.dumps({**holder, "system": "another machine"}))
    with ExitStack() as lock:  # whether that one is alive is not known
        assert begun(tmp_path, lock).name == "0003"


def test_runs_that_start_together_get_a_version_each_and_hear_of_nothing(tmp_path, caplog):
    together = Barrier(8)

    def start(_: int) -> str:
        together.wait()
        with ExitStack() as lock:
            assert RunDirectory(tmp_path, "digits").unfinished() is not None
            path = begun(tmp_path, lock)
            together.wait()
        return path.name

    with caplog.at_level(logging.INFO), ThreadPoolExecutor(8) as pool:
        versions = sorted(pool.map(start, range(8)))
    assert versions == [f"{version:04d}" for version in range(1, 9)]
    assert "status" not in caplog.text

"""Run directory: versions are never shared, files are whole or as they were, refusals are early."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from threading import Barrier

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.errors import ConfigError, RunDirectoryError, StateError
from distaff.run.directory.run_directory import RunDirectory
from distaff.run.directory.run_log import open_log


def everything_below(directory):
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path, "digits")
    run.create()
    return run


def test_run_directory_writes_nothing_before_create(tmp_path):
    run = RunDirectory(tmp_path / "runs", "digits")
    run.check_writable()
    assert not run.created
    with pytest.raises(StateError, match=re.escape("Call create() first")):
        run.write_json("config.json", {})
    assert everything_below(tmp_path) == []


def test_create_reserves_the_next_version_and_keeps_it(tmp_path):
    first, second = RunDirectory(tmp_path, "a/b"), RunDirectory(tmp_path, "a/b")
    assert first.create() == first.create() == first.path == tmp_path / "a/b/0001"
    assert second.create() == tmp_path / "a/b/0002"
    assert second.created


def test_create_continues_after_the_highest_version(tmp_path):
    for name in ("0003", "10000", "notes", "0004.bak"):
        (tmp_path / "run" / name).mkdir(parents=True)
    assert RunDirectory(tmp_path).create().name == "10001"


def test_create_in_parallel_gives_every_run_its_own_version(tmp_path):
    count = 16
    barrier = Barrier(count)

    def create(_):
        run = RunDirectory(tmp_path, "digits")
        barrier.wait()
        return run.create().name

    with ThreadPoolExecutor(count) as pool:
        versions = sorted(pool.map(create, range(count)))
    assert versions == [f"{version:04d}" for version in range(1, count + 1)]


def test_create_passes_over_a_version_that_another_process_took(tmp_path, monkeypatch):
    (tmp_path / "run" / "0001").mkdir(parents=True)
    monkeypatch.setattr(os, "listdir", lambda _: [])
    assert RunDirectory(tmp_path).create().name == "0002"


def test_open_finds_an_existing_run(run):
    run.write_json("metrics/test.json", {"loss": 0.5})
    opened = RunDirectory.open(str(run.path))
    assert opened.created
    assert opened.create() == run.path
    assert opened.read_json("metrics/test.json") == {"loss": 0.5}
    with pytest.raises(RunDirectoryError, match="nowhere"):
        RunDirectory.open(run.path / "nowhere")


@pytest.mark.parametrize(
    "name", ["", "/abs", "..", "a/../b", "a//b", "a/", ".", "a\nb", "a\0", "\\"]
)
def test_run_directory_refuses_names_that_leave_it(tmp_path, run, name):
    with pytest.raises(ConfigError, match="simple path components"):
        RunDirectory(tmp_path, name)
    with pytest.raises(ConfigError, match="simple path components"):
        run.write_text(name, "")


@settings(deadline=None)
@given(st.text(st.sampled_from("a./\\~ \n\0é"), max_size=6))
def test_run_directory_accepts_only_names_below_the_root(tmp_path_factory, name):
    root = tmp_path_factory.getbasetemp() / "root"
    try:
        run = RunDirectory(root, name)
    except ConfigError:
        return
    assert os.path.normpath(root / name) == str(root / name) != str(root)
    assert not run.created


@pytest.mark.parametrize("obstacle", ["runs", "runs/digits"])
@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_check_writable_names_a_file_in_the_way(tmp_path, obstacle, kind):
    path = tmp_path / obstacle
    path.parent.mkdir(exist_ok=True)
    if kind == "file":
        path.write_text("precious")
    else:
        path.symlink_to("nowhere")
    before = everything_below(tmp_path)
    run = RunDirectory(tmp_path / "runs", "digits")
    for attempt in (run.check_writable, run.create):
        with pytest.raises(RunDirectoryError, match=r"Move that file|Check the path") as caught:
            attempt()
        assert "runs" in str(caught.value)
    assert not run.created
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.EACCES, "change its permissions"),
        (errno.EROFS, "Choose another root"),
        (errno.ENOSPC, "Free some space"),
    ],
)
def test_run_directory_explains_a_refusing_file_system(tmp_path, monkeypatch, code, remedy):
    def refuse(path, *_):
        raise OSError(code, os.strerror(code), path)

    monkeypatch.setattr(os, "mkdir", refuse)
    run = RunDirectory(tmp_path, "digits")
    for attempt in (run.check_writable, run.create):
        with pytest.raises(RunDirectoryError, match=remedy) as caught:
            attempt()
        assert str(tmp_path) in str(caught.value)
        assert os.strerror(code) in str(caught.value)
    assert everything_below(tmp_path) == []


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_write_json_that_fails_leaves_the_old_file_whole(run, monkeypatch, function):
    run.write_json("config.json", {"version": "old"})

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, refuse)
    with pytest.raises(RunDirectoryError, match="No space left"):
        run.write_json("config.json", {"version": "new"})
    assert run.read_json("config.json") == {"version": "old"}
    assert everything_below(run.path) == ["config.json"]


def test_write_json_that_is_interrupted_leaves_no_temporary_file(run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.write_text("notes.txt", "half")
    assert everything_below(run.path) == []


def test_written_files_are_not_writable_by_everybody(run):
    previous = os.umask(0)
    try:
        run.write_text("notes.txt", "é\n")
        with open_log(run.path):
            pass
    finally:
        os.umask(previous)
    assert (run.path / "notes.txt").read_bytes() == "é\n".encode()
    for name in ("notes.txt", "log.txt"):
        assert not (run.path / name).stat().st_mode & stat.S_IWOTH


def test_read_json_names_the_file_that_is_absent_or_broken(run):
    with pytest.raises(RunDirectoryError, match=re.escape("config.json")):
        run.read_json("config.json")
    for broken in (b'{"a": ', b"\xff", b'{"a": NaN}', b"[" * 10**5):
        (run.path / "config.json").write_bytes(broken)
        with pytest.raises(RunDirectoryError, match=r"config\.json' is not"):
            run.read_json("config.json")


def test_set_status_keeps_the_start_and_adds_the_end(run):
    run.set_status("running", step=0, epoch=0)
    running = run.read_json("status.json")
    assert running == {
        "status": "running",
        "started": running["started"],
        "ended": None,
        "starts": 1,
        "step": 0,
        "epoch": 0,
    }
    running["started"] = "2020-01-01T00:00:00+00:00"
    run.write_json("status.json", running)
    run.set_status("interrupted", step=7, epoch=1, reason="SIGTERM")
    ended = run.read_json("status.json")
    assert ended["started"] == running["started"]
    assert (ended["status"], ended["step"], ended["reason"]) == ("interrupted", 7, "SIGTERM")
    assert datetime.fromisoformat(ended["ended"]).utcoffset() == timedelta(0)
    with pytest.raises(ConfigError, match="Did you mean 'finished'"):
        run.set_status("finishd")


def test_set_status_counts_the_starts_of_a_run_that_is_resumed(run):
    run.set_status("running")
    run.set_status("running", step=3)
    run.set_status("interrupted")
    assert run.read_json("status.json")["starts"] == 1
    started = "2020-01-01T00:00:00+00:00"
    run.write_json("status.json", {"status": "failed", "started": started})
    second = RunDirectory.open(run.path)
    second.set_status("running")
    second.set_status("finished")
    status = run.read_json("status.json")
    assert (status["starts"], status["started"]) == (2, started)
    RunDirectory.open(run.path).set_status("failed")
    assert run.read_json("status.json")["starts"] == 2


@pytest.mark.parametrize(
    "content", ["[]", "{}", "1", '{"started": 3, "starts": "many"}', "{", "[" * 10**5]
)
def test_set_status_overcomes_a_status_that_is_broken(run, content):
    (run.path / "status.json").write_text(content)
    run.set_status("running")
    status = run.read_json("status.json")
    assert datetime.fromisoformat(status["started"])
    assert status["starts"] in (1, 2)


def test_unfinished_lists_the_newest_first_and_names_what_it_passes_over(tmp_path, caplog):
    run = RunDirectory(tmp_path / "runs", "digits")
    assert run.unfinished() == []
    statuses = ["running", "finished", "interrupted", "stopped", "failed", "pruned"]
    contents = [
        *(json.dumps({"status": status}) for status in statuses),
        *(
            "",
            "[]",
            '{"status": ["running"]}',
            '{"status": "runing"}',
            "[" * 10**5,
            "NaN",
            "\udcff",
        ),
    ]
    for content in contents:
        path = RunDirectory(tmp_path / "runs", "digits").create() / "status.json"
        path.write_text(content, errors="surrogateescape")
    RunDirectory(tmp_path / "runs", "digits").create()
    os.mkfifo(RunDirectory(tmp_path / "runs", "digits").create() / "status.json")
    (RunDirectory(tmp_path / "runs", "digits").create() / "status.json").mkdir()
    with (RunDirectory(tmp_path / "runs", "digits").create() / "status.json").open("wb") as file:
        file.truncate(2**40)
    (tmp_path / "runs" / "digits" / "0099").write_text("no directory")
    (tmp_path / "runs" / "digits" / "notes").mkdir()
    before, kept = everything_below(tmp_path), {}
    found = [tmp_path / "runs" / "digits" / version for version in ("0005", "0003", "0001")]
    assert run.unfinished() == []  # the sixth came to its end
    for version in (v for v in range(7, 18) if v != 14):
        assert f"digits/{version:04d} cannot be resumed" in caplog.text
    assert "digits/0014" not in caplog.text  # one that is only being made
    for version, expected in (("0006", found[:1]), ("0004", found[:2]), ("0002", found)):
        file = tmp_path / "runs" / "digits" / version / "status.json"
        shown = file.read_text()
        file.unlink()
        assert run.unfinished() == expected
        assert RunDirectory.open(found[0]).unfinished() == expected
        kept[file] = shown
    for file, shown in kept.items():
        file.write_text(shown)
    assert "0099" not in caplog.text
    assert everything_below(tmp_path) == before
    assert not run.created


def test_unfinished_gives_absolute_paths_wherever_the_program_is(tmp_path, monkeypatch):
    run = RunDirectory("runs", "digits")
    RunDirectory("runs", "digits").create()
    Path("runs/digits/0001/status.json").write_text('{"status": "running"}')
    here = Path.cwd()
    monkeypatch.chdir("runs")
    assert run.unfinished() == [here / "runs/digits/0001"]


def test_write_environment_records_versions_and_devices(run):
    run.write_environment()
    environment = run.read_json("env.json")
    assert environment["python"] == sys.version.split()[0]
    assert environment["packages"]["jax"] == jax.__version__
    assert environment["packages"]["orbax-checkpoint"]
    assert environment["devices"]["count"] == jax.device_count()
    assert environment["processes"] == 1
    assert environment["argv"] == sys.argv


def test_write_environment_records_the_commit_and_whether_it_is_changed(run, tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))

    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def recorded():
        run.write_environment()
        return run.read_json("env.json")["git"]

    assert recorded() is None
    git("init", "-q")
    assert recorded() is None
    (checkout / "train.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    (checkout / "runs").mkdir()
    (checkout / "runs" / "untracked").write_text("")
    commit = git("rev-parse", "HEAD")
    assert recorded() == {"commit": commit, "dirty": False}
    (checkout / "train.py").write_text("22")
    assert recorded() == {"commit": commit, "dirty": True}
    monkeypatch.setenv("PATH", "")
    assert recorded() is None


def test_open_log_writes_in_utc_only_while_it_is_open(run, monkeypatch):
    for holder, name in ((logging.Formatter, "converter"), (time, "localtime")):
        monkeypatch.setattr(holder, name, lambda *_: time.gmtime(0))
    logger = logging.getLogger("distaff")
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
    before = (logger.level, logger.propagate, list(logger.handlers))
    with contextlib.suppress(RuntimeError), open_log(run.path) as opened:
        assert opened is logger
        logging.getLogger("distaff.run.loop").info("step %d", 3)
        raise RuntimeError
    logger.warning("too late")
    assert (logger.level, logger.propagate, logger.handlers) == before
    line = (run.path / "log.txt").read_text()
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT[\d:]{8}Z INFO distaff\.run\.loop: step 3\n", line)

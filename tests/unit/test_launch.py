"""`distaff launch`: which process failed first, signals, logs, exit statuses, restarts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

import distaff.cli

WAIT = """
import os, pathlib, signal, sys, time
index = int(os.environ["DISTAFF_PROCESS_ID"])

def wait_for(name):
    while not pathlib.Path(name).exists():
        time.sleep(0.01)

def rest():  # not signal.pause(): a signal right before it is handled after it
    for _ in range(30_000):
        time.sleep(0.01)

"""
TIMEOUT = 120


class Launched(NamedTuple):
    status: int
    out: str
    err: str

    def log(self, index: int) -> str:
        return Path("logs", f"process-{index}.log").read_text()


def launch(capsys: pytest.CaptureFixture[str], script: str, *words: str, rest=()) -> Launched:
    Path("script.py").write_text(WAIT + script)
    words = ("launch", "--processes", "2", "--logs", "logs", *words, "script.py", *rest)
    status = distaff.cli.main(words)
    return Launched(status, *capsys.readouterr())


def test_processes_know_their_place_and_write_a_log_each(capsys):
    script = """
names = "COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID", "LOCAL_PROCESSES", "HEARTBEAT"
print(*(os.environ[f"DISTAFF_{name}"] for name in names), *sys.argv[1:], __name__, __file__)
print(os.environ["JAX_NUM_CPU_DEVICES"], os.environ["JAX_PLATFORMS"], file=sys.stderr)
"""
    words = ("--devices-per-process", "3", "--heartbeat=20s")
    done = launch(capsys, script, *words, rest=("--width", "8"))
    assert done.status == 0, done.err
    for index in (0, 1):
        pattern = rf"127\.0\.0\.1:\d+ 2 {index} 2 20\.0 --width 8 __main__ script\.py\n3 cpu\n"
        assert re.fullmatch(pattern, done.log(index))
    assert done.out == done.log(0)
    assert done.err == "distaff launch: 2 processes, logs in logs\n"


def test_first_failure_is_shown_last_and_ends_the_others(capsys):
    script = """
def end(number, frame):
    print("asked to end", flush=True)
    sys.exit(7)

if index == 0:
    signal.signal(signal.SIGTERM, end)
    pathlib.Path("ready").touch()
    rest()
wait_for("ready")
raise ValueError("boom")
"""
    done = launch(capsys, script)
    assert (done.status, done.out) == (1, "asked to end\n")
    _, first, *lines = done.err.splitlines()
    assert first.startswith("distaff launch: process 1 of 2 failed first (exit status 1).")
    assert first.endswith("The last lines of logs/process-1.log:")
    assert lines[0] == "  Traceback (most recent call last):"
    assert lines[1].startswith('    File "script.py", line ')
    assert lines[-1] == "  ValueError: boom"


def test_process_that_does_not_end_is_killed_after_the_grace(capsys):
    script = """
if index == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(os.getpid(), flush=True)
    pathlib.Path("ready").touch()
    rest()
wait_for("ready")
print("the last line", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = launch(capsys, script, "--grace", "0.1s")
    assert done.status == 137
    assert "process 1 of 2 failed first (killed by SIGKILL)" in done.err
    assert done.err.endswith("  the last line\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.out), 0)


def test_failed_job_starts_again_at_another_address(capsys):
    script = """
with open(f"starts-{index}", "a") as file:
    print(os.environ["DISTAFF_COORDINATOR_ADDRESS"], file=file)
starts = len(pathlib.Path(f"starts-{index}").read_text().split())
other = pathlib.Path(f"starts-{1 - index}")
while not other.exists() or len(other.read_text().split()) < starts:
    time.sleep(0.01)
if starts == 1 and index == 1:
    sys.exit("no memory")
if starts == 2 and index == 0:
    sys.exit(124)
if starts == 2:
    rest()
"""
    done = launch(capsys, script, "--restarts", "5")
    assert done.status == 0
    assert re.findall(r"(?:process|starting) .*(?=\.|: restart)|restart .*", done.err) == [
        "process 1 of 2 failed first (exit status 1). The last lines of logs/process-1",
        "starting all processes again",
        "restart 1 of 5",
        "process 0 of 2 stalled first (exit status 124). The last lines of logs/process-0",
        "starting all processes again",
        "restart 2 of 5",
    ]
    assert done.err.count("  no memory\n") == 1
    starts = Path("starts-0").read_text().split(), Path("starts-1").read_text().split()
    assert starts[0] == starts[1]
    assert len(set(starts[0])) == 3


@pytest.mark.parametrize(("status", "starts"), [(2, 1), (3, 2)])
def test_only_failures_that_may_pass_start_again(status, starts, capsys):
    script = f"""
if index == 0:
    print("start", flush=True)
    sys.exit({status})
rest()
"""
    done = launch(capsys, script, "--restarts", "1")
    assert (done.status, done.out) == (status, "start\n" * starts)


def started(script: str, *words: str) -> subprocess.Popen[str]:
    """Starts a launcher as a process, and returns it when both scripts have printed "ready"."""
    Path("script.py").write_text(WAIT + script)
    code = "import sys; from distaff.cli import main; sys.exit(main())"
    words = ("launch", "--processes", "2", "--logs", "logs", *words, "script.py")
    launcher = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout.readline() == "ready\n", launcher.communicate()[1]
    return launcher


def wait_for_both(name: str) -> None:
    """Waits for a file of each process."""
    deadline = time.monotonic() + TIMEOUT
    while not all(Path(name.format(index)).exists() for index in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


READY = """
def save(number, frame):
    print(f"{index} saves", flush=True)
    pathlib.Path(f"saved-{index}").touch()

signal.signal(signal.SIGUSR1, save)
pathlib.Path(f"ready-{index}").touch()
wait_for(f"ready-{1 - index}")
if index == 0:
    print("ready", flush=True)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_request_to_stop_reaches_all_and_is_no_failure(number, status):
    script = (
        f"stop = {int(number)}"
        + """
def end(number, frame):
    print(f"{index} stops", flush=True)
    if index:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    sys.exit(0)

signal.signal(stop, end)
"""
    )
    launcher = started(script + READY + "rest()\n", "--restarts", "3")
    try:
        launcher.send_signal(signal.SIGUSR1)
        wait_for_both("saved-{}")
        launcher.send_signal(number)
        out, err = launcher.communicate(timeout=TIMEOUT)
    finally:
        launcher.kill()
    assert launcher.returncode == status
    assert out == "0 saves\n0 stops\n"
    assert err == "distaff launch: 2 processes, logs in logs\n"
    assert Path("logs", "process-1.log").read_text() == "1 saves\n1 stops\n"


def test_third_request_ends_processes_that_do_not_stop():
    script = """
def ignore(number, frame):
    asked = len(list(pathlib.Path().glob(f"asked-{index}-*")))
    pathlib.Path(f"asked-{index}-{asked}").touch()

signal.signal(signal.SIGTERM, ignore)
"""
    launcher = started(script + READY + "rest()\n", "--grace", "0.1s")
    try:
        for count in range(2):
            launcher.send_signal(signal.SIGTERM)
            wait_for_both(f"asked-{{}}-{count}")
        assert launcher.poll() is None
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(TIMEOUT) == 143
    finally:
        launcher.kill()
        launcher.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_processes_end_with_a_launcher_that_is_killed():
    script = """
def end(number, frame):
    pathlib.Path(f"ended-{index}").touch()
    os._exit(0)

signal.signal(signal.SIGTERM, end)
"""
    launcher = started(script + READY + "rest()\n")
    launcher.kill()
    launcher.communicate()
    wait_for_both("ended-{}")
    assert launcher.returncode == -signal.SIGKILL
    assert sorted(path.name for path in Path().glob("ended-*")) == ["ended-0", "ended-1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--processes", "0", "s.py"), "--processes"),
        (("--processes", "2", "--restarts=-1", "s.py"), "--restarts"),
        (("--processes", "2", "--grace", "soon", "s.py"), "--grace must be a positive duration"),
        (("--processes", "2"), "needs what to start"),
        (("--processes", "2", "missing.py"), "no file 'missing.py'"),
        (("--processes", "2", "missing.py:main"), "no file 'missing.py'"),
        (("--processes", "2", "digit"), "no recipe 'digit'. Did you mean 'digits'?"),
        (("s.py",), "--processes"),
    ],
)
def test_wrong_commands_start_nothing(words, message, capsys, tmp_path):
    Path("s.py").touch()
    try:
        status = distaff.cli.main(("launch", *words))
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["s.py"]

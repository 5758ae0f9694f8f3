"""Interruption: real signals, to this process and to processes that end by them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from distaff.errors import ConfigError
from distaff.run.supervision.interruption import Interruption

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def sigterm_handler():
    """Collects the SIGTERMs that would end pytest, and checks that handlers are restored."""
    heard: list[int] = []

    def collect(number, frame):
        heard.append(number)

    previous = signal.signal(signal.SIGTERM, collect)
    # A shell starts what it runs in the background with SIGINT ignored.
    previous_int = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(number) for number in SIGNALS]
    yield heard
    assert [signal.getsignal(number) for number in SIGNALS] == before
    signal.signal(signal.SIGTERM, previous)
    signal.signal(signal.SIGINT, previous_int)


def test_nothing_heard_is_no_reason(sigterm_handler):
    with Interruption() as interruption:
        assert interruption.reason is None
        assert interruption.agreed() is None
    assert sigterm_handler == []


def test_sigterm_sets_the_reason_and_is_sent_again_afterwards(sigterm_handler, capfd):
    with Interruption() as interruption:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.reason == interruption.agreed() == "SIGTERM"
        assert sigterm_handler == []
    assert sigterm_handler == [signal.SIGTERM]
    assert capfd.readouterr().err.count("SIGTERM: the run is saved") == 1


def test_first_interrupt_sets_the_reason_and_the_second_ends_at_once(sigterm_handler, capfd):
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.reason == "Ctrl-C"
        assert "A second Ctrl-C" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert sigterm_handler == []


def test_one_interrupt_leaves_quietly():
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
    assert interruption.reason == "Ctrl-C"


def test_interrupt_after_sigterm_is_a_first_one(sigterm_handler):
    # A launcher may turn one Ctrl-C into both.
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert interruption.reason == "SIGTERM"
    assert sigterm_handler == [signal.SIGTERM]


def test_sigterm_after_an_interrupt_is_the_reason(sigterm_handler):
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert interruption.reason == "SIGTERM"
    assert sigterm_handler == [signal.SIGTERM]


def test_exception_is_not_hidden_by_a_sigterm(sigterm_handler):
    def run():
        with Interruption():
            signal.raise_signal(signal.SIGTERM)
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run()
    assert sigterm_handler == []


def test_max_time_is_a_reason_when_it_has_passed():
    now = [100.0]
    with Interruption(max_time="3h30m", clock=lambda: now[0]) as interruption:
        now[0] += 12_599.9
        assert interruption.reason is None
        now[0] += 0.1
        assert interruption.reason == interruption.agreed() == "max_time=3h30m"


def test_max_time_is_checked():
    with pytest.raises(ConfigError, match="max_time must be a positive duration"):
        Interruption(max_time="soon")


def test_signal_after_max_time_is_not_forgotten(sigterm_handler):
    now = [0.0]
    with Interruption(max_time=1, clock=lambda: now[0]) as interruption:
        now[0] = 2.0
        assert interruption.reason == "max_time=1"
        signal.raise_signal(signal.SIGTERM)
    assert sigterm_handler == [signal.SIGTERM]


def test_inner_run_passes_signals_to_the_outer_one(sigterm_handler, capfd):
    with Interruption() as outer:
        with Interruption() as inner:
            signal.raise_signal(signal.SIGTERM)
            assert (inner.reason, outer.reason) == ("SIGTERM", "SIGTERM")
        assert sigterm_handler == []
    assert sigterm_handler == [signal.SIGTERM]
    assert capfd.readouterr().err.count("SIGTERM") == 1


def test_inner_run_passes_interrupts_to_the_outer_one():
    with Interruption() as outer, Interruption() as inner:
        signal.raise_signal(signal.SIGINT)
        assert (inner.reason, outer.reason) == ("Ctrl-C", "Ctrl-C")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_inner_run_that_hears_nothing_leaves_the_outer_one_listening(sigterm_handler):
    with Interruption() as outer:
        with Interruption():
            pass
        signal.raise_signal(signal.SIGTERM)
        assert outer.reason == "SIGTERM"
    assert sigterm_handler == [signal.SIGTERM]


def test_other_thread_sets_no_handler_and_honors_max_time(sigterm_handler):
    before = [signal.getsignal(number) for number in SIGNALS]
    found = []

    def run():
        with Interruption(max_time=1e-9) as interruption:
            found.append([signal.getsignal(number) for number in SIGNALS])
            found.append(interruption.reason)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before, "max_time=1e-09"]


def test_ignored_signal_stays_ignored():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGINT)
            assert interruption.reason is None
    finally:
        signal.signal(signal.SIGINT, previous)


def test_handler_that_somebody_sets_meanwhile_stays():
    heard = []
    previous = signal.getsignal(signal.SIGINT)
    try:
        with Interruption():
            signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
        signal.raise_signal(signal.SIGINT)
        assert heard == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, previous)


SCRIPT = """
import os, signal, sys, threading, time
from distaff.run.supervision.interruption import Interruption

signal.signal(signal.SIGINT, signal.default_int_handler)

def run(enclosed=lambda: None):
    with Interruption() as interruption:
        enclosed()
        print("ready")
        sys.stderr.flush()
        os.write(1, b"go\\n")
        deadline = time.monotonic() + 30
        while interruption.reason is None and time.monotonic() < deadline:
            time.sleep(0.005)
        print("saved", interruption.reason)
    print("goes on")

def fork():
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, b"x")  # a signal that comes sooner, Python forgets
        time.sleep(30)
        os._exit(0)
    os.read(reader, 1)
    os.kill(child, signal.SIGTERM)
    print("child", os.WTERMSIG(os.waitpid(child, 0)[1]))

"""


def start(call: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT + call],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": ""},
    )


def test_processes_end_by_the_signal_that_came() -> None:
    handled = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); run()"
    # The kernel spares the first process of a container; a blocked signal ends none either.
    spared = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])"
    spared = f"run(lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(0), {spared}))"
    kept, ended = {}, {}
    for name, call in {
        "plain": "run()",
        "handled": handled,
        "spared": spared,
        "fork": "run(fork)",
        "interrupted": "run()",
    }.items():
        kept[name] = start(call)
    for name, process in kept.items():
        assert process.stdout.readline() == "go\n"
        if name != "spared":
            process.send_signal(signal.SIGINT if name == "interrupted" else signal.SIGTERM)
    for name, process in kept.items():
        with process:
            printed = process.stdout.read().split()  # flushed when the process ends
        ended[name] = process.returncode, printed
    assert ended == {
        "plain": (-signal.SIGTERM, ["ready", "saved", "SIGTERM"]),
        "handled": (7, ["ready", "saved", "SIGTERM"]),
        "spared": (143, ["ready", "saved", "SIGTERM"]),
        "fork": (-signal.SIGTERM, ["child", "15", "ready", "saved", "SIGTERM"]),
        "interrupted": (0, ["ready", "saved", "Ctrl-C", "goes", "on"]),
    }

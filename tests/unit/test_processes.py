"""Two processes: they agree on the step to stop at, and name who is missing at a barrier."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from distaff.errors import BarrierError, ConfigError
from distaff.execution.processes import Agreement, barrier, missing_processes

PAIR = """
import json, os, sys, time
import jax

rank, address = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_enable_preemption_service", sys.argv[3] == "service")
jax.distributed.initialize(
    address, 2, rank, coordinator_bind_address=address if rank == 0 else None,
    initialization_timeout=60, shutdown_timeout_seconds=10,
)
from distaff.execution.processes import Agreement, barrier
from distaff.errors import BarrierError
from distaff.run.supervision.interruption import Interruption
from distaff.run.supervision.watchdog import Watchdog

def stops_at(interruption):
    for step in range(1, 3000):
        time.sleep(0.002 * (1 + rank))
        reason = interruption.agreed()
        if reason is not None:
            return step, reason

facts = {}
with Interruption(max_time=0.2 if rank == 0 else None) as interruption:
    facts["max_time"] = stops_at(interruption)

barrier("before", 30)
barrier("before", 30)
log = sys.argv[4]
with Watchdog(0.5, path=log) as watchdog:
    watchdog.beat("waiting for data" if rank == 1 else "a step", 7)
    deadline = time.monotonic() + 20
    while "Not all processes" not in (os.path.exists(log) and open(log).read() or ""):
        time.sleep(0.02)
        assert time.monotonic() < deadline
facts["watchdog"] = open(log).read()
if rank == 0:
    try:
        barrier("rank 0 alone", 0.3)
    except BarrierError as error:
        facts["barrier"] = str(error)
barrier("after", 30)

with Interruption() as interruption:
    print("ready", flush=True)
    facts["signal"] = stops_at(interruption)
    print(json.dumps(facts), flush=True)
    time.sleep(0.5 * rank)  # as long as saving takes
"""


def start(rank: int, address: str, *arguments: str, code: str = PAIR) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(rank), address, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


@pytest.mark.slow_but("service")
@pytest.mark.parametrize("service", ["service", "none"])
def test_two_processes_stop_at_the_same_step_and_name_who_is_missing(tmp_path, service):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    logs = [tmp_path / f"log{rank}.txt" for rank in range(2)]
    pair = [start(rank, address, service, str(log)) for rank, log in enumerate(logs)]
    try:
        for process in pair:
            lines = iter(process.stdout.readline, "")
            assert "ready\n" in lines, process.stderr.read()
        time.sleep(0.2)
        pair[1].send_signal(signal.SIGTERM)
        ends = [process.communicate(timeout=60) for process in pair]
    finally:
        for process in pair:
            process.kill()
    facts = [json.loads(out) for out, _ in ends]
    assert facts[0]["max_time"][0] == facts[1]["max_time"][0] > 1
    assert [each["max_time"][1] for each in facts] == ["max_time=0.2", "max_time"]
    assert facts[0]["signal"] == facts[1]["signal"]
    assert facts[0]["signal"][1] == "SIGTERM"
    assert [process.returncode for process in pair] == [-signal.SIGTERM] * 2
    assert "'rank 0 alone' within 0.3 s" in facts[0]["barrier"]
    assert "(missing: 1; this is process 0)" in facts[0]["barrier"]
    assert "missing: 1; this is process 0" in facts[0]["watchdog"]
    assert "missing: 0; this is process 1" in facts[1]["watchdog"]


def test_one_process_agrees_with_itself():
    agreement = Agreement(preempted=3)
    assert [agreement(code) for code in (0, 2, 0)] == [0, 2, 0]


def test_one_process_waits_for_nobody():
    barrier("here")
    with pytest.raises(ConfigError, match="timeout must be a positive duration"):
        barrier("here", "never")


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        ("1\n\n\nRPC: /xla.Barrier [x='']", (1,)),
        ("12\n3\n", (3, 12)),
        ("/job:jax_worker/replica:0/task:7\n/job:jax_worker/replica:0/task:0\n", (0, 7)),
        ("", ()),
    ],
)
def test_missing_processes_are_read_from_the_message(names, missing):
    message = "Barrier timed out. Id: 5\n# of tasks: 1/2.\nThe first task at the barrier: 0. "
    assert missing_processes(f"{message}Some timed out task names:\n{names}") == missing
    assert missing_processes(message) == ()


def test_barrier_error_is_a_timeout():
    assert issubclass(BarrierError, TimeoutError)
    assert jax.process_count() == 1


def test_fast_and_slow_processes_exchange_at_the_same_calls(monkeypatch):
    meeting, told, calls = threading.Barrier(2, timeout=10.0), {}, ({}, {})
    monkeypatch.setattr("distaff.execution.processes.SECONDS_BETWEEN", 0.05)
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def process_allgather(row):
        told[int(threading.current_thread().name)] = row
        meeting.wait()
        rows = np.stack([told[0], told[1]])
        meeting.wait()
        return rows

    monkeypatch.setattr(
        "distaff.execution.processes.multihost_utils.process_allgather", process_allgather
    )

    def run(rank):
        agreement = Agreement(preempted=3)
        for call in range(1, 200):
            time.sleep(0.001 * (1 + 2 * rank))
            agreed = agreement(2 if rank == 1 and call > 120 else 0)
            calls[rank][call] = agreed
            if agreed:
                return

    threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls[0] == calls[1]
    assert 120 < len(calls[0]) < 199
    assert calls[0][len(calls[0])] == 2


TRAINERS = """
import os, sys
import jax

rank, address = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_num_cpu_devices", 1)
jax.distributed.initialize(
    address, 2, rank, coordinator_bind_address=address if rank == 0 else None,
    initialization_timeout=60, shutdown_timeout_seconds=10,
)
import numpy as np
from distaff import data, zoo
from distaff.errors import ConfigError
from distaff.tasks import Classifier

x = np.ones((8, 8), np.float32)
loader = data.ArrayLoader({"image": x, "label": np.zeros(8, np.int32)}, 4)
trainer = Classifier(zoo.MLP((4, 2)), example_batch=next(iter(loader)), enable_progress_bar=False)
try:
    trainer.train_model(loader, num_epochs=1)
except ConfigError as error:
    print(error, flush=True)
print(os.path.exists("runs"), trainer.predict(loader).shape, sorted(trainer.eval_model(loader)))
"""


@pytest.mark.slow
def test_two_processes_evaluate_and_do_not_train():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    pair = [start(rank, address, code=TRAINERS) for rank in range(2)]
    try:
        ends = [process.communicate(timeout=60) for process in pair]
    finally:
        for process in pair:
            process.kill()
    for rank, (out, err) in enumerate(ends):
        assert f"jax.process_count() is 2 (this is process {rank})" in out, err
        assert "Start one process without jax.distributed.initialize()" in out
        assert out.splitlines()[-1] == "False (8, 2) ['accuracy', 'loss']"

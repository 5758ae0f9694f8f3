"""Two real processes join under `distaff launch`, Slurm and Open MPI, and end together."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.scale import ordered_run
from tests.scale.ordered_run import NEVER, growing

import distaff.cli
from distaff import History, MeshConfig

CHECKOUT = Path(ordered_run.__file__).parents[2]
TIMEOUT = 300
SCRIPT = """
import sys
from distaff.distributed import initialize

initialize(heartbeat="60s")

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

index = jax.process_index()
print(jax.device_count(), process_allgather(np.array([index + 7])).ravel().tolist(), flush=True)
if index == 1 and sys.argv[1:]:
    raise ValueError("boom")
process_allgather(np.array([index]))
"""


@pytest.fixture
def script() -> Path:
    path = Path("script.py")
    path.write_text(SCRIPT)
    return path


def own_lines(text: str) -> list[str]:
    """Returns the lines of the script, without those of JAX's collectives."""
    return [line for line in text.splitlines() if not line.startswith("[Gloo]")]


@pytest.mark.slow
def test_launched_processes_exchange_numbers_and_a_failure_ends_both(script, capsys):
    words = ("launch", "--processes", "2", "--devices-per-process", "2", "--logs", "logs")
    assert distaff.cli.main((*words, str(script))) == 0
    out, err = capsys.readouterr()
    host = socket.gethostname()
    first = f"distaff: process 0 of 2 on {host} (distaff launch)"
    assert own_lines(out) == [first, "4 [7, 8]"]
    assert own_lines(Path("logs", "process-1.log").read_text()) == ["4 [7, 8]"]
    assert err == "distaff launch: 2 processes, logs in logs\n"
    assert distaff.cli.main((*words, "--grace", "60s", str(script), "fail")) == 1
    out, err = capsys.readouterr()
    assert "process 1 of 2 failed first (exit status 1)" in err
    assert err.endswith("  ValueError: boom\n")


def environments(launcher: str, port: int) -> list[dict[str, str]]:
    """Returns the variables that a launcher gives to two processes of this machine."""
    if launcher == "slurm":
        shared = {
            "SLURM_JOB_ID": "71",
            "SLURM_STEP_NODELIST": "127.0.0.1",
            "SLURM_NTASKS": "2",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_TASKS_PER_NODE": "2",
            "JAX_COORDINATOR_PORT": str(port),
        }
        names = "SLURM_PROCID", "SLURM_LOCALID"
    else:
        shared = {
            "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            "JAX_COORDINATOR_PORT": str(port),
        }
        names = "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"
    return [os.environ | shared | dict.fromkeys(names, str(index)) for index in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["slurm", "ompi"])
def test_processes_of_a_scheduler_find_each_other_by_its_variables(launcher, script):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    pair = [
        subprocess.Popen(
            [sys.executable, str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for environment in environments(launcher, port)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert [own_lines(out)[-1] for out in outputs] == ["2 [7, 8]"] * 2


@pytest.mark.slow
def test_process_that_waits_in_vain_says_for_what(script, capsys):
    script.write_text(
        "import os, signal\nif os.environ['DISTAFF_PROCESS_ID'] == '0': signal.pause()\n" + SCRIPT
    )
    words = ("launch", "--processes", "2", "--start-timeout", "1s", "--logs", "logs")
    assert distaff.cli.main((*words, str(script))) == 1
    err = capsys.readouterr().err
    assert re.search(r"process 1 of 2 failed first", err)
    assert re.search(r"Process 1 waited 1 s for the others at 127\.0\.0\.1:\d+\. Check", err)


TRAIN = """
import numpy as np
from distaff import Callback, data, tasks, zoo

def train(**options):
    random = np.random.default_rng(0)
    rows = {
        "image": random.normal(size=(32, 8)).astype(np.float32),
        "label": random.integers(4, size=32).astype(np.int32),
    }
    loader = data.ArrayLoader(rows, 8, shuffle=True)
    trainer = tasks.Classifier(zoo.MLP((16, 4)), recompile="error", **options)
    return trainer.train_model(loader, data.ArrayLoader(rows, 8), num_epochs=4)
"""
LAUNCHED = """
import os, pathlib, signal, jax

class Dies(Callback):
    def on_epoch_end(self, info):
        if jax.process_index() == 1 and info.epoch == 3 and not pathlib.Path("died").exists():
            pathlib.Path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

train(name="launched", mesh="dp", callbacks=[Dies()])
"""


@pytest.mark.slow
def test_launched_training_resumes_after_a_kill_with_the_losses_of_one_process(capsys):
    join = "from distaff.distributed import initialize\ninitialize(heartbeat='60s')\n"
    Path("script.py").write_text(join + TRAIN + LAUNCHED)
    words = ("launch", "--processes", "2", "--restarts", "1", "--logs", "logs", "script.py")
    status = distaff.cli.main(words)
    out, err = capsys.readouterr()
    assert status == 0, err
    assert "process 1 of 2 failed first (killed by SIGKILL)" in err
    assert "restart 1 of 1" in err
    assert re.search(r"launched/0001 from its checkpoint of step \d+, epoch \d", out), out
    namespace: dict[str, Any] = {}
    exec(TRAIN, namespace)
    expected = namespace["train"](name="alone", mesh=MeshConfig(2)).history["train/loss"]
    launched = History.read("runs/launched/0001")["train/loss"]
    np.testing.assert_allclose(launched, expected, rtol=2e-6)


UNEVEN = """
import time
from distaff import distributed

distributed.initialize(heartbeat="60s")

import jax
from tests.scale.ordered_run import At, make, train

for run in range(10):
    slow = At(0, lambda: time.sleep(0.1 * jax.process_index()))
    result = train(make(None, slow, enable_progress_bar=False), 2)
    print("run", run, result.status, result.step, flush=True)
"""


@pytest.mark.slow
def test_ten_runs_with_default_options_end_though_one_process_is_slow(monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(CHECKOUT), *sys.path]))
    Path("script.py").write_text(UNEVEN)
    words = ("--processes", "2", "--devices-per-process", "2", "--logs", "logs", "script.py")
    assert distaff.cli.main(("launch", *words)) == 0, capsys.readouterr().err
    for log in Path("logs").iterdir():
        ends = [line for line in log.read_text().splitlines() if line.startswith("run ")]
        assert ends == [f"run {run} finished 12" for run in range(10)]


GROWING = """
import sys
from distaff import distributed

distributed.initialize()

from tests.scale.ordered_run import At, growing, interrupt

growing("runs", At(int(sys.argv[1]), interrupt))
"""


@pytest.mark.slow
def test_run_moves_from_two_processes_to_three_and_to_one(monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(CHECKOUT), *sys.path]))
    Path("script.py").write_text(GROWING)
    for processes, step in (("2", "30"), ("3", "65")):
        words = ("--processes", processes, "--devices-per-process", "1", "--logs", "logs")
        status = distaff.cli.main(("launch", *words, "script.py", step))
        out, err = capsys.readouterr()
        assert status == 130, err
        assert f"{processes} cpu devices: fsdp={processes}" in out
    one = MeshConfig(1)
    moved = growing("runs", NEVER, mesh=one)
    assert moved.first_step in range(58, 66)
    whole = growing(None, NEVER, mesh=one).history
    found = History.read(moved.path)
    np.testing.assert_array_equal(found["step/order"], whole["step/order"])
    np.testing.assert_allclose(found["step/loss"], whole["step/loss"], rtol=2e-6)

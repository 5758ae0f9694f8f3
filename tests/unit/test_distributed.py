"""`distaff.distributed.initialize`: what each launcher's variables make of a process."""

from __future__ import annotations

import re
import sys
import threading
import types
from typing import Any

import jax
import pytest

from distaff import distributed, tasks, zoo
from distaff.core import launched
from distaff.distributed import failure, joining
from distaff.distributed.gpus import gpus_of, idle_gpus, visible_gpus
from distaff.distributed.launchers import place_of
from distaff.errors import ConfigError
from distaff.run.identity.ending import ending
from distaff.run.supervision.watchdog import Watchdog

LAUNCH = {
    launched.COORDINATOR: "127.0.0.1:1234",
    launched.COUNT: "2",
    launched.INDEX: "1",
    launched.LOCAL_COUNT: "2",
    launched.HEARTBEAT: "20.0",
    launched.START_TIMEOUT: "30.0",
}
SLURM = {
    "SLURM_JOB_ID": "71",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "node[7-8]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_GPUS_ON_NODE": "8",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What reaches `jax.distributed.initialize`, in a process in which JAX has not started."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: found.update(given))
    monkeypatch.setattr(joining, "has_started", lambda: False)
    monkeypatch.setattr(joining, "visible_gpus", lambda environ: 8)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # restored after the test
    return found


def use(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (
            LAUNCH,
            {
                "coordinator_address": "127.0.0.1:1234",
                "coordinator_bind_address": "127.0.0.1:1234",
                "num_processes": 2,
                "process_id": 1,
                "cluster_detection_method": "deactivate",
                "local_device_ids": [4, 5, 6, 7],
                "heartbeat_timeout_seconds": 20,
                "initialization_timeout": 90,
            },
        ),
        (
            SLURM,
            {
                "cluster_detection_method": "slurm",
                "local_device_ids": [4, 5, 6, 7],
                "heartbeat_timeout_seconds": 10,
                "initialization_timeout": 360,
            },
        ),
        (
            SLURM | OPEN_MPI,  # mpirun in a Slurm allocation
            {
                "cluster_detection_method": "ompi",
                "local_device_ids": [0, 1, 2, 3, 4, 5, 6, 7],
                "heartbeat_timeout_seconds": 10,
                "initialization_timeout": 360,
            },
        ),
        (
            OPEN_MPI | {"JAX_COORDINATOR_ADDRESS": "node7:1234"},
            {
                "coordinator_address": "node7:1234",
                "num_processes": 4,
                "process_id": 0,
                "cluster_detection_method": "deactivate",
                "local_device_ids": [0, 1, 2, 3, 4, 5, 6, 7],
                "heartbeat_timeout_seconds": 10,
                "initialization_timeout": 360,
            },
        ),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"},
            {
                "cluster_detection_method": None,
                "local_device_ids": None,
                "heartbeat_timeout_seconds": 10,
                "initialization_timeout": 360,
            },
        ),
    ],
    ids=["launch", "slurm", "open mpi", "open mpi with an address", "kubernetes"],
)
def test_launcher_decides_the_arguments_of_jax(environ, expected, joined, monkeypatch, capsys):
    use(monkeypatch, environ)
    hook = sys.excepthook
    distributed.initialize()
    assert joined == expected
    assert sys.excepthook is not hook
    printed = capsys.readouterr().err
    assert ("8 of the 8 GPUs" in printed) == ("OMPI_COMM_WORLD_SIZE" in environ)


def test_arguments_take_precedence(joined, monkeypatch, capsys):
    use(monkeypatch, SLURM)
    distributed.initialize(
        "10.0.0.1:99", 3, 0, local_device_ids=[2], heartbeat="1m", start_timeout="2m"
    )
    assert joined == {
        "coordinator_address": "10.0.0.1:99",
        "num_processes": 3,
        "process_id": 0,
        "cluster_detection_method": "deactivate",
        "local_device_ids": [2],
        "heartbeat_timeout_seconds": 60,
        "initialization_timeout": 180,
    }
    assert "distaff: process 0 of 3 on " in capsys.readouterr().err
    with pytest.raises(ConfigError, match="num_processes and process_id belong together"):
        distributed.initialize("10.0.0.1:99")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_JOB_ID": "71"},
        SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
)
def test_one_process_joins_nobody(environ, joined, monkeypatch, capsys):
    use(monkeypatch, environ)
    distributed.initialize()
    assert joined == {}
    assert capsys.readouterr().err == "distaff: one process\n"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({launched.COUNT: "2"}, "DISTAFF_PROCESS_ID and DISTAFF_COORDINATOR_ADDRESS is missing"),
        (LAUNCH | {launched.INDEX: "2"}, "must be from 0 to 1, for 2 processes; .* gives 2"),
        (LAUNCH | {launched.COUNT: "two"}, "DISTAFF_NUM_PROCESSES must be .* it is 'two'"),
        (LAUNCH | {launched.START_TIMEOUT: "soon"}, "start_timeout must be a positive duration"),
        ({"JAX_COORDINATOR_ADDRESS": "node7:1"}, "no launcher says which process this is"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, "alone in a Slurm job of 2 tasks.*`srun`"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, "alone in a Slurm job of 4 tasks"),
        (SLURM | {"SLURM_LOCALID": ""}, "SLURM_LOCALID must be a whole number; it is ''"),
        (
            {name: value for name, value in OPEN_MPI.items() if "MCA" not in name},
            "mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT",
        ),
        (LAUNCH | {launched.COUNT: "3", launched.LOCAL_COUNT: "3"}, "cannot share 8 GPU"),
    ],
)
def test_variables_that_cannot_be_right_are_an_error(environ, message, joined, monkeypatch):
    use(monkeypatch, environ)
    with pytest.raises(ConfigError, match=message):
        distributed.initialize()
    assert joined == {}


class FakeRay:
    """The parts of Ray Train that a worker asks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, index: int) -> None:
        self.sent: list[str | None] = []
        self.count, self.index = count, index
        names = ("ray", "ray.train", "ray.train.collective", "ray.util")
        ray, train, collective, util = (types.ModuleType(name) for name in names)
        vars(ray)["train"], vars(train)["get_context"] = train, lambda: self
        vars(collective)["broadcast_from_rank_zero"] = self.broadcast
        vars(util)["get_node_ip_address"] = lambda: "10.0.0.7"
        for module in (ray, train, collective, util):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.delitem(sys.modules, "distaff.integrations.deployment.ray", raising=False)

    def get_world_size(self) -> int:
        if not self.count:
            raise RuntimeError("not in a worker")
        return self.count

    def get_world_rank(self) -> int:
        return self.index

    def broadcast(self, address: str | None) -> str:
        self.sent.append(address)
        return address or "10.0.0.7:4321"


def test_workers_of_ray_join_at_an_address_of_the_first(joined, monkeypatch, capsys):
    use(monkeypatch, SLURM)  # on which the cluster of Ray may run
    ray = FakeRay(monkeypatch, count=2, index=1)
    distributed.initialize()
    assert ray.sent == [None]
    names = ("coordinator_address", "num_processes", "process_id", "local_device_ids")
    assert [joined[name] for name in names] == ["10.0.0.7:4321", 2, 1, list(range(8))]

    ray = FakeRay(monkeypatch, count=2, index=0)
    distributed.initialize()
    assert joined["coordinator_address"] == ray.sent[0]
    assert re.fullmatch(r"10\.0\.0\.7:\d+", joined["coordinator_address"])
    assert "process 0 of 2" in capsys.readouterr().err

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    distributed.initialize()  # as JaxTrainer has done for workers with GPUs


@pytest.mark.parametrize("count", [0, 1])
def test_program_that_only_imports_ray_joins_nobody(count, joined, monkeypatch, capsys):
    FakeRay(monkeypatch, count=count, index=0)
    distributed.initialize()
    assert not joined
    assert "one process" in capsys.readouterr().err


def test_what_jax_cannot_detect_is_an_error_with_a_remedy(joined, monkeypatch, capsys):
    def fails(**given: Any) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fails)
    monkeypatch.setattr(joining, "_may_be_tpu", lambda: True)
    distributed.initialize()  # a TPU without others
    assert capsys.readouterr().err == "distaff: one process\n"
    use(monkeypatch, {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"})
    with pytest.raises(ConfigError, match=r'of Kubernetes: coord.*Install the package "kubernetes'):
        distributed.initialize()


def test_joining_is_done_once_and_before_jax_starts(joined, monkeypatch):
    use(monkeypatch, LAUNCH)
    monkeypatch.setattr(joining, "has_started", lambda: True)
    with pytest.raises(ConfigError, match=r"JAX has started.*before any JAX array"):
        distributed.initialize()
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    distributed.initialize()  # the command has joined them before it called the recipe
    with pytest.raises(ConfigError, match="has joined the others already"):
        distributed.initialize("10.0.0.1:99", 2, 1)
    assert joined == {}


def test_trainer_of_a_process_that_has_not_joined_is_an_error(monkeypatch):
    use(monkeypatch, LAUNCH)
    with pytest.raises(ConfigError, match=r"process 1 of 2, but .*Call distaff\.distributed\.init"):
        tasks.Classifier(zoo.MLP((4, 2)))


@pytest.mark.parametrize(
    ("changes", "visible", "expected", "idle"),
    [
        ({}, 8, [4, 5, 6, 7], ""),
        ({"SLURM_STEP_TASKS_PER_NODE": "4,2"}, 8, [4, 5, 6, 7], ""),
        ({"SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_LOCALID": "0"}, 8, [*range(8)], ""),
        ({}, 4, [0, 1, 2, 3], ""),  # --gpus-per-task=4
        ({"SLURM_GPUS_ON_NODE": "2"}, 1, [0], ""),
        ({"SLURM_GPUS_ON_NODE": "7", "SLURM_LOCALID": "0"}, 7, None, "5 of 7 GPUs"),
        ({"SLURM_STEP_TASKS_PER_NODE": "?"}, 8, None, ""),
        ({}, 0, None, ""),
    ],
)
def test_processes_of_a_node_share_its_gpus(changes, visible, expected, idle):
    environ = SLURM | changes
    place = place_of(environ)
    used = gpus_of(place, visible, environ)
    assert used == expected
    warning = idle_gpus(place, visible, used)
    assert idle in warning if idle else not warning


def test_gpus_are_counted_without_jax(monkeypatch):
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}) == 0  # JAX_PLATFORMS is cpu
    monkeypatch.setattr("distaff.distributed.gpus.on_cpu_alone", lambda: False)
    counts = [visible_gpus({"CUDA_VISIBLE_DEVICES": text}) for text in ("0,GPU-71", "", "-1")]
    assert counts == [2, 0, 0]


def test_failed_process_leaves_after_its_traceback(monkeypatch, capsys):
    left: list[int] = []
    monkeypatch.setattr(failure.os, "_exit", left.append)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    failure.leave_on_errors()
    for error in (ValueError("boom"), KeyboardInterrupt()):
        sys.excepthook(type(error), error, None)
    failure.leave(1)
    assert left == []  # alone, it ends as usual
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    for error in (ValueError("boom"), KeyboardInterrupt(), ConfigError("wrong")):
        sys.excepthook(type(error), error, None)
    failure.leave(0)
    assert left == [1, 130, 2]
    assert capsys.readouterr().err.startswith("ValueError: boom\n")


def test_stalled_process_of_a_launcher_ends(monkeypatch, capfd):
    left, has_left = [], threading.Event()
    monkeypatch.setenv(launched.END_STALLED, "1")
    monkeypatch.setattr(
        "distaff.run.supervision.watchdog.os._exit",
        lambda code: (left.append(code), has_left.set()),
    )
    with Watchdog(0.1) as watchdog:
        watchdog.beat("a step", 7)
        assert has_left.wait(60.0)
    assert left == [124]
    assert "at step 7, a step has taken" in (err := capfd.readouterr().err)
    assert "the process ends with status 124." in err


def test_run_that_lost_a_process_is_resumed():
    lost = ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
    assert ending(lost)["resumable"]
    assert not ending(ValueError("UNKNOWN class 7"))["resumable"]

"""Ray Train: finds the place of a worker, so that workers train one model together."""

from __future__ import annotations

import socket

import ray.train
from ray.train.collective import broadcast_from_rank_zero
from ray.util import get_node_ip_address

from distaff.distributed.launchers import RAY, ProcessPlace


def place() -> ProcessPlace | None:
    """Returns the place of this worker; None outside of Ray Train, or if it is the only worker.

    All workers must call this: the first one chooses an address, and broadcasts it. `JaxTrainer`
    joins workers with TPUs or GPUs itself; on CPUs, it runs one job per worker instead.
    """
    try:
        context = ray.train.get_context()
        count, index = context.get_world_size(), context.get_world_rank()
    except RuntimeError:  # a program that only imports Ray
        return None
    if count == 1:
        return None
    address = broadcast_from_rank_zero(_free_address() if index == 0 else None)
    # Ray shows each worker its own GPUs only, so that it shares them with nobody.
    return ProcessPlace(RAY, "deactivate", address, count, index, local_count=1, local_index=0)


def _free_address() -> str:
    """Returns an address of this machine with a free port."""
    with socket.socket() as free:
        free.bind(("", 0))
        return f"{get_node_ip_address()}:{free.getsockname()[1]}"

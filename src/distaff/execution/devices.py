"""Checks of the processes and devices in use: training uses one process and one device."""

from __future__ import annotations

import jax

from distaff.core.typing import Batch
from distaff.errors import ConfigError
from distaff.execution.placement import num_devices

_HIDING = {
    "cpu": "leave jax_num_cpu_devices and --xla_force_host_platform_device_count unset",
    "gpu": "set CUDA_VISIBLE_DEVICES=0, or ROCR_VISIBLE_DEVICES=0 for AMD,",
}


def check_one_process() -> None:
    """Checks that there is only one process. Starts JAX's backend.

    Raises:
        ConfigError: `jax.distributed` has joined several processes.
    """
    number = jax.process_count()
    if number > 1:
        raise ConfigError(
            f"Training runs in one process; jax.process_count() is {number} (this is process "
            f"{jax.process_index()}). Each process would train its own model on all of the data. "
            "Start one process without jax.distributed.initialize(). For independent runs, such "
            "as one seed per GPU, start each without it and under its own name."
        )


def idle_devices(batch: Batch) -> str:
    """Returns a line about local devices that training leaves idle; empty if all are used.

    Args:
        batch: a batch of the train loader. Steps run on the devices of its arrays: a loader may
            place them on several devices.
    """
    local, used = jax.local_devices(), num_devices(batch)
    if used >= len(local):
        return ""
    platform = local[0].platform
    hiding = _HIDING.get("gpu" if platform in ("cuda", "rocm") else platform, "")
    remedy = f" To hide the others, {hiding} before the program starts." if hiding else ""
    number = "One" if used == 1 else str(used)
    computes = "computes" if used == 1 else "compute"
    return f"{number} of {len(local)} local {platform} devices {computes}.{remedy}"

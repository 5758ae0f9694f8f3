"""Devices: training uses one process and one device, and says so where there are more."""

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
    """Checks that this process trains alone. It starts JAX's backend.

    Raises:
        ConfigError: `jax.distributed` has joined several processes.
    """
    number = jax.process_count()
    if number > 1:
        raise ConfigError(
            f"Training runs in one process; jax.process_count() is {number} (this is process "
            f"{jax.process_index()}). Each of them would train its own model on all of the data. "
            "Start one process without jax.distributed.initialize(). For independent runs, such "
            "as one seed per GPU, start each without it, and give each a name of its own."
        )


def idle_devices(batch: Batch) -> str:
    """Returns a line on the local devices that a training leaves idle; empty where none is.

    Args:
        batch: of the train loader. Steps run where its arrays are: a loader may place them on
            several devices.
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

"""The description of a GPU that XLA compiles for, from its published figures."""

from __future__ import annotations

from typing import NamedTuple

from distaff.plan.targets import Target


class _Gpu(NamedTuple):
    """What a program's code depends on.

    Attributes:
        capability: the CUDA compute capability.
        cores: streaming multiprocessors.
        kib_per_core: shared memory and L1 cache of a multiprocessor that blocks can share, in KiB.
        l2_mib: the L2 cache in MiB.
        clock: the boost clock in GHz.
    """

    capability: int
    cores: int
    kib_per_core: int
    l2_mib: int
    clock: float


_GPUS = {
    "a100": _Gpu(8, 108, 164, 40, 1.41),
    "h100": _Gpu(9, 132, 228, 50, 1.98),
    "h200": _Gpu(9, 132, 228, 50, 1.98),
}

_TEXT = """gpu_device_info {{
  cuda_compute_capability {{ major: {gpu.capability} }}
  core_count: {gpu.cores}
  fpus_per_core: {fpus}
  clock_rate_ghz: {gpu.clock}
  memory_bandwidth: {chip.memory_rate:.0f}
  device_memory_size: {chip.memory}
  l2_cache_size: {l2}
  shared_memory_per_core: {shared}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {optin}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{chip.title}"
"""


def target_config(target: Target) -> str:
    """Returns the text that describes the GPU of a target to XLA."""
    gpu = _GPUS[target.text.strip().lower().partition(":")[0]]
    return _TEXT.format(
        gpu=gpu,
        chip=target.chip,
        fpus=128 if gpu.capability >= 9 else 64,
        l2=gpu.l2_mib * 2**20,
        shared=gpu.kib_per_core * 2**10,
        optin=(gpu.kib_per_core - 1) * 2**10,  # a block leaves 1 KiB to the system
    )

"""Makes the devices of a target: simulated on the CPU, or known to a compiler only."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies

from distaff.errors import ConfigError, MissingExtraError
from distaff.execution.compilers import load_idle
from distaff.plan.gpus import target_config
from distaff.plan.targets import Target

_CUDA = "jax_plugins.xla_cuda12"

_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else one process at a time may compile
}
"""What libtpu needs to compile on a machine without a TPU."""


def devices_of(target: Target) -> list[Any]:
    """Returns the devices of a target, for programs that are compiled and never run.

    Raises:
        ConfigError: JAX has started with too few devices, or the compiler has no such devices.
        MissingExtraError: the compiler is not installed.
    """
    if target.chip.platform == "cpu":
        return _simulated(target)
    try:
        if target.chip.platform == "cuda":
            _require("jax_cuda12_pjrt", _CUDA, "plan-gpu")
            load_idle(_CUDA)
            return list(_gpus(target).devices)
        _require("libtpu", "libtpu", "plan-tpu")
        for name, value in _TPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        return list(topologies.get_topology_desc(target.text, platform="tpu").devices)
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError, NotImplementedError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"The compiler for target={target.text!r} cannot make these devices: "
            f"{str(error).splitlines()[0]} Use a number of devices that exists, and a compiler of "
            f"the same version as JAX {jax.__version__}."
        ) from error


def _simulated(target: Target) -> list[Any]:
    devices = jax.devices("cpu")
    if len(devices) < target.num_devices:
        raise ConfigError(
            f"target={target.text!r} needs {target.num_devices} simulated CPU devices, but JAX has "
            f"started with {len(devices)}. Use `distaff plan` or distaff.plan_recipe, which start "
            "a process of their own, or call jax.config.update('jax_num_cpu_devices', "
            f"{target.num_devices}) at the top of the program."
        )
    return devices[: target.num_devices]


def _gpus(target: Target) -> Any:
    hosts, per_host = target.shape
    return topologies.get_topology_desc(
        "",
        platform="cuda",
        target_config=target_config(target),
        topology=f"1x{hosts}x{per_host}",  # slices x hosts x GPUs
    )


def _require(package: str, module: str, extra: str) -> None:
    """Checks that a compiler is installed, in the version of JAX if that is its own."""
    try:
        missing = importlib.util.find_spec(module) is None
    except ModuleNotFoundError:
        missing = True
    if missing:
        raise MissingExtraError(
            f"Planning for this target needs the package {package!r}, which is not installed. "
            f'Install it with: pip install "distaff[{extra}]"'
        )
    version = importlib.metadata.version(package)
    if package.startswith("jax_") and version != jax.__version__:
        raise ConfigError(
            f"{package} {version} does not fit JAX {jax.__version__}. Install the same version: "
            f'pip install "{package}=={jax.__version__}".'
        )

"""The devices that a run can be planned for, by name, with their published figures."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Literal

from distaff.errors import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A kind of device.

    The rates are from the data sheets of the A100 80GB SXM, H100 SXM and H200 SXM (dense bfloat16
    and TF32, NVLink in one direction; one ConnectX card per GPU, 200 Gb/s of the DGX A100 and
    400 Gb/s of the DGX H100), and from the TPU pages of Google Cloud (bfloat16, HBM, all links of a
    chip in one direction; the higher figure where the pages of v6e differ). Programs reach less.

    Attributes:
        platform: the compiler: `"cpu"`, `"cuda"` or `"tpu"`.
        title: its name, as JAX shows it.
        memory: bytes of its memory that programs can use; None if it depends on the machine.
        half: FLOPs per second of products in bfloat16; None if they are unknown.
        single: FLOPs per second of products in float32 at JAX's default precision.
        memory_rate: bytes per second of its memory.
        link_rate: bytes per second that it sends to the devices of the same host, or of a TPU pod.
        network_rate: bytes per second that it sends to other hosts.
        per_host: devices of a host.
    """

    platform: Literal["cpu", "cuda", "tpu"]
    title: str
    memory: int | None = None
    half: float | None = None
    single: float = 1.0
    memory_rate: float = 1.0
    link_rate: float = 1.0
    network_rate: float = 1.0
    per_host: int = 8


def _tpu(title: str, memory: float, half: float, memory_rate: float, links: float) -> Chip:
    """Returns a TPU. It multiplies float32 in one pass of bfloat16 by default."""
    return Chip(
        platform="tpu",
        title=title,
        memory=int(memory * GIB),
        half=half,
        single=half,
        memory_rate=memory_rate,
        link_rate=links,
        network_rate=links,
        per_host=4,
    )


CHIPS = {
    "cpu": Chip(platform="cpu", title="simulated CPU device", per_host=2**30),
    "a100": Chip(
        platform="cuda",
        title="NVIDIA A100-SXM4-80GB",
        memory=79 * GIB,
        half=312e12,
        single=156e12,
        memory_rate=2.039e12,
        link_rate=300e9,
        network_rate=25e9,
    ),
    "h100": Chip(
        platform="cuda",
        title="NVIDIA H100 80GB HBM3",
        memory=79 * GIB,
        half=989e12,
        single=494e12,
        memory_rate=3.35e12,
        link_rate=450e9,
        network_rate=50e9,
    ),
    "h200": Chip(
        platform="cuda",
        title="NVIDIA H200",
        memory=139 * GIB,
        half=989e12,
        single=494e12,
        memory_rate=4.8e12,
        link_rate=450e9,
        network_rate=50e9,
    ),
    "v5e": _tpu("TPU v5e", 15.75, 197e12, 819e9, 200e9),
    "v5p": _tpu("TPU v5p", 95, 459e12, 2765e9, 600e9),
    "v6e": _tpu("TPU v6e", 31.25, 918e12, 1640e9, 448e9),
}
"""Kinds of devices by name."""

_FORMS = "cpu:8, h100:8, h100:32x8 (hosts x GPUs), v5e:4x4 or v5p:4x4x4 (a grid of chips)"
_MOST_DEVICES = 2**16


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to plan for.

    Attributes:
        text: as given, such as `"h100:32x8"`.
        chip: the kind of each device.
        shape: hosts and devices per host of GPUs; the grid of a TPU; the number of CPU devices.
    """

    text: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        """The number of devices."""
        return math.prod(self.shape)

    @property
    def per_host(self) -> int:
        """Devices that exchange arrays without the network between hosts."""
        cuda = self.chip.platform == "cuda"
        return self.shape[-1] if cuda else max(self.num_devices, self.chip.per_host)

    @property
    def doubled(self) -> Target:
        """Twice the devices: GPUs of a host up to their usual number, else hosts.

        The grid of a TPU grows along its shortest axis.
        """
        shape = list(self.shape)
        if self.chip.platform == "tpu":
            shape[max(range(len(shape)), key=lambda axis: (-shape[axis], axis))] *= 2
        else:
            shape[-1 if 2 * shape[-1] <= self.chip.per_host else 0] *= 2
        name = self.text.strip().lower().partition(":")[0]
        return Target(f"{name}:{'x'.join(map(str, shape))}", self.chip, tuple(shape))


def target_of(text: str) -> Target:
    """Returns the target of a text, such as `"h100:32x8"`.

    Raises:
        ConfigError: the device or the form is unknown.
    """
    name, _, shape = str(text).strip().lower().partition(":")
    if name not in CHIPS:
        raise ConfigError(
            f"target={text!r} names no known device. Use one of {', '.join(CHIPS)}, such as "
            f"{_FORMS}."
        )
    chip = CHIPS[name]
    if not shape and chip.platform != "tpu":
        shape = "1"
    sizes = tuple(map(int, shape.split("x"))) if re.fullmatch(r"\d+(x\d+)*", shape) else ()
    if chip.platform == "cuda" and len(sizes) == 1:
        sizes = _hosts(text, sizes[0], chip.per_host)
    axes = {"cpu": (1,), "cuda": (2,), "tpu": (2, 3)}[chip.platform]
    if len(sizes) not in axes or not 0 < math.prod(sizes) <= _MOST_DEVICES:
        raise ConfigError(f"target={text!r} has no valid number of devices. Write {_FORMS}.")
    return Target(text, chip, sizes)


def _hosts(text: str, number: int, per_host: int) -> tuple[int, ...]:
    if number <= per_host:
        return 1, number
    if number % per_host:
        raise ConfigError(
            f"target={text!r} is not a multiple of {per_host} GPUs per host. Name hosts and GPUs, "
            "such as h100:4x6."
        )
    return number // per_host, per_host

"""The time of a step if a device reached its published rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from distaff.plan.program.collectives import Collective
from distaff.plan.targets import Chip

_ONE_TO_ONE = ("all-to-all", "ragged-all-to-all", "collective-permute")
"""Exchanges in which each device sends something else, so that no other one can send it."""

_TERMS = ("compute", "memory", "network")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepBounds:
    """Lower bounds of the seconds of a step, from the published rates of the devices.

    Attributes:
        compute: if only the matrix products and convolutions took time.
        memory: if only reading and writing the memory of a device took time.
        network: if only the exchanges between devices took time, one after another.
        network_by_axis: the part of `network` over each mesh axis, such as `{"fsdp": 0.01}`.
    """

    compute: float
    memory: float
    network: float
    network_by_axis: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def step(self) -> float:
        """The longest of them."""
        return max(self.compute, self.memory, self.network)

    @property
    def bound(self) -> str:
        """The name of the longest: `"compute"`, `"memory"` or `"network"`."""
        return max(_TERMS, key=lambda name: getattr(self, name))

    def to_json(self) -> dict[str, Any]:
        """Returns the times as JSON."""
        return {**dataclasses.asdict(self), "step": self.step, "bound": self.bound}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StepBounds:
        """Returns the times that `to_json` wrote."""
        return cls(**{each.name: data[each.name] for each in dataclasses.fields(cls)})


def step_bounds(
    chip: Chip, flops: Mapping[str, float], moved: float, exchanges: Iterable[Collective]
) -> StepBounds | None:
    """Returns lower bounds of the time of a step; None if the rates of the device are unknown.

    Args:
        chip: the kind of device.
        flops: floating point operations of matrix products and convolutions, by dtype.
        moved: bytes that are read from and written to the memory of a device.
        exchanges: the exchanges between devices, which follow one another.
    """
    if chip.half is None:
        return None
    network: dict[str, float] = {}
    for each in exchanges:
        network[each.over] = network.get(each.over, 0) + each.sent_bytes / exchange_rate(chip, each)
    return StepBounds(
        compute=flops.get("bfloat16", 0) / chip.half + flops.get("float32", 0) / chip.single,
        memory=moved / chip.memory_rate,
        network=sum(network.values()),
        network_by_axis=network,
    )


def exchange_rate(chip: Chip, each: Collective) -> float:
    """Returns the bytes per second that each device sends in an exchange, at most.

    In a host, devices use its links. Between hosts, the devices of one host send different parts of
    the exchange, as NCCL does with one ring per network card, so their cards add up until the links
    are the limit.
    """
    if each.num_hosts == 1:
        return chip.link_rate
    cards = 1 if each.kind in _ONE_TO_ONE else each.num_devices / each.num_hosts
    return min(chip.link_rate, cards * chip.network_rate)

"""What one mesh axis of twice the size would change."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distaff.mesh import MeshConfig
from distaff.mesh.config import BATCH_AXES
from distaff.plan.roofline import StepBounds

GROWING = ("data", "fsdp", "tensor")
"""The axes that can grow without a change of the model. A pipeline's length is in its code."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrownPlan:
    """A plan in brief: the same step with one mesh axis of twice the size.

    If this axis splits the batch, the batch of all devices doubles too, so that each device keeps
    its number of examples. All bytes are per device.

    Attributes:
        axis: the mesh axis that is doubled; empty in the plan that is compared with.
        size: its new size.
        target: the devices: twice as many.
        num_devices: the devices of the mesh.
        num_examples: examples in a batch of all devices.
        state_bytes: bytes of the state.
        peak_bytes: bytes during a step; None if the step does not compile.
        fits: whether the peak fits the memory of a device; None if that is not known.
        exchanged_bytes: bytes of all exchanges in a step.
        times: lower bounds of the time of a step; None if the rates of the target are unknown.
        failure: why there is no such plan; empty if there is one.
    """

    axis: str
    size: int
    target: str
    num_devices: int
    num_examples: int
    state_bytes: int = 0
    peak_bytes: int | None = None
    fits: bool | None = None
    exchanged_bytes: int = 0
    times: StepBounds | None = None
    failure: str = ""

    @property
    def examples_per_second(self) -> float | None:
        """Examples per second and device at most; None if the rates are unknown."""
        if self.failure or self.times is None or not self.times.step:
            return None
        return self.num_examples / self.num_devices / self.times.step

    @property
    def bytes_per_example(self) -> float:
        """Bytes that all devices exchange for each example."""
        return self.exchanged_bytes * self.num_devices / max(1, self.num_examples)

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as JSON."""
        times = self.times.to_json() if self.times else None
        rate = self.examples_per_second
        return {**dataclasses.asdict(self), "times": times, "examples_per_second": rate}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GrownPlan:
        """Returns the plan that `to_json` wrote."""
        fields: dict[str, Any] = {each.name: data[each.name] for each in dataclasses.fields(cls)}
        fields["times"] = fields["times"] and StepBounds.from_json(fields["times"])
        return cls(**fields)


def doublings(config: MeshConfig, sizes: Mapping[str, int]) -> Iterator[tuple[str, MeshConfig]]:
    """Yields each axis that can grow, with the mesh in which it has twice its size.

    Args:
        config: the mesh.
        sizes: the sizes of its axes.
    """
    for axis in GROWING:
        yield axis, dataclasses.replace(config, **{**sizes, axis: 2 * sizes[axis]})


def batch_of_all(axis: str, num_examples: int) -> int:
    """Returns the examples of a batch of all devices, if an axis doubles."""
    return num_examples * (2 if axis in BATCH_AXES else 1)


def first_to_grow(found: Sequence[GrownPlan]) -> GrownPlan | None:
    """Returns the doubled axis that serves best; None if none fits.

    It processes the most examples per second and device, or, where the rates are unknown, exchanges
    the fewest bytes for each. Among equals, the lowest peak decides.
    """

    def merit(each: GrownPlan) -> tuple[float, float]:
        rate = each.examples_per_second
        rate = -each.bytes_per_example if rate is None else rate
        return float(f"{rate:.3g}"), -(each.peak_bytes or 0)

    possible = [each for each in found if not each.failure and each.fits is not False]
    return max(possible, key=merit, default=None)

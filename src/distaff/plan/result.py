"""`TrainingPlan`: memory, traffic and time of a training step that was compiled, but not run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distaff.core.files import write_whole
from distaff.plan.growth import GrownPlan, first_to_grow
from distaff.plan.program.collectives import Collective
from distaff.plan.roofline import StepBounds
from distaff.plan.text import as_tables

VERSION = 1
"""The version of the form of `plan.json`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter of the model.

    Attributes:
        path: such as `"Dense_0/kernel"`.
        shape: its whole shape.
        dtype: its dtype.
        spec: the mesh axes of each array axis.
        device_bytes: bytes on each device.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    device_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a training step needs on each device. All bytes and FLOPs are per device.

    Attributes:
        name: the recipe, or the class of the trainer.
        target: the devices, such as `"h100:32x8"`.
        device: the kind of each device.
        num_devices: the devices of the mesh.
        mesh: sizes of the mesh axes.
        batch: shapes of a batch of all devices.
        num_examples: its examples.
        num_parameters: values of all parameters.
        parameters: all parameters, the largest first.
        parameter_bytes: bytes of the parameters.
        state_bytes: bytes of the state: parameters, optimizer state, averages and statistics.
        peak_bytes: bytes during a step: arguments, results that are not in their memory, and
            temporary arrays; on TPUs the compiler's own figure. None if the compiler gives up
            because they do not fit.
        temporary_bytes: bytes of temporary arrays.
        memory_bytes: memory of a device; None if it is not known.
        verdict: the compiler's own words, if the step does not fit.
        is_upper_bound: whether the figures come from simulated CPU devices, which need more
            memory and traffic than accelerators.
        collectives: exchanges between devices, the largest first.
        traffic_from: the target whose program they are read from.
        memory_traffic: bytes that a step reads and writes in the memory of the device, by the
            program for `traffic_from`. Compilers for CPUs fuse fewer operations, so it is too high
            in plans for TPUs and CPUs.
        flops: floating point operations of a step by dtype of the products, and `"other"`.
        times: lower bounds of the time of a step; None if the rates of the target are unknown.
        warnings: what to change.
        doubled: the same step with each mesh axis of twice the size, if it was asked for.
        seconds: seconds to trace, lower, compile and read the program.
        host_bytes: peak memory of the process that planned.
        jax: the version of JAX.
    """

    name: str
    target: str
    device: str
    num_devices: int
    mesh: Mapping[str, int]
    batch: str
    num_examples: int
    num_parameters: int
    parameters: tuple[Parameter, ...]
    parameter_bytes: int
    state_bytes: int
    peak_bytes: int | None
    temporary_bytes: int | None
    memory_bytes: int | None
    verdict: str
    is_upper_bound: bool
    collectives: tuple[Collective, ...]
    traffic_from: str
    memory_traffic: int
    flops: Mapping[str, float]
    times: StepBounds | None
    warnings: tuple[str, ...]
    seconds: Mapping[str, float]
    host_bytes: int
    jax: str
    doubled: tuple[GrownPlan, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether a step fits the memory of a device; None if that is not known."""
        if self.verdict:
            return False
        if self.memory_bytes is None or self.peak_bytes is None:
            return None
        return self.peak_bytes <= self.memory_bytes

    @property
    def traffic(self) -> dict[str, int]:
        """Bytes of each kind of exchange and its mesh axes: `{"all-gather over fsdp": 123}`."""
        found: dict[str, int] = {}
        for each in self.collectives:
            name = f"{each.kind} over {each.over}"
            found[name] = found.get(name, 0) + each.num_bytes
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def brief(self, axis: str = "") -> GrownPlan:
        """Returns the plan in brief, to compare it with others.

        Args:
            axis: the mesh axis that differs from the others.
        """
        return GrownPlan(
            axis=axis,
            size=self.mesh.get(axis, 0),
            target=self.target,
            num_devices=self.num_devices,
            num_examples=self.num_examples,
            state_bytes=self.state_bytes,
            peak_bytes=self.peak_bytes,
            fits=self.fits,
            exchanged_bytes=sum(each.num_bytes for each in self.collectives),
            times=self.times,
        )

    @property
    def first_to_grow(self) -> GrownPlan | None:
        """The doubled mesh axis that serves best; None if none fits, or none was planned."""
        return first_to_grow(self.doubled)

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as JSON."""
        fields = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        grown = self.first_to_grow
        return {
            "version": VERSION,
            **fields,
            "mesh": dict(self.mesh),
            "parameters": [dataclasses.asdict(each) for each in self.parameters],
            "collectives": [each._asdict() for each in self.collectives],
            "times": self.times and self.times.to_json(),
            "doubled": [each.to_json() for each in self.doubled],
            "first_to_grow": grown and grown.axis,
            "fits": self.fits,
            "traffic": self.traffic,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainingPlan:
        """Returns the plan that `to_json` wrote."""
        fields = {each.name: data[each.name] for each in dataclasses.fields(cls)}
        times = fields["times"]
        parameters: list[dict[str, Any]] = [
            {**each, "shape": tuple(each["shape"])} for each in data["parameters"]
        ]
        collectives: list[dict[str, Any]] = [
            {**each, "axes": tuple(each["axes"])} for each in data["collectives"]
        ]
        fields.update(
            parameters=tuple(Parameter(**each) for each in parameters),
            collectives=tuple(Collective(**each) for each in collectives),
            warnings=tuple(data["warnings"]),
            times=times and StepBounds.from_json(times),
            doubled=tuple(GrownPlan.from_json(each) for each in data["doubled"]),
        )
        return cls(**fields)

    def save(self, path: str | Path) -> None:
        """Writes the plan to a JSON file."""
        write_whole(Path(path), json.dumps(self.to_json(), indent=2) + "\n")

    def __str__(self) -> str:
        """Returns the tables of the plan."""
        return as_tables(self)

"""`MeshConfig`: how the devices are arranged, and which arrays are split over them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY
from typing import Any, Literal, TypeAlias

import jax
import numpy as np

from distaff.core.config.checks import whole
from distaff.errors import ConfigError
from distaff.mesh.planned import planned_devices

AXES = ("data", "pipe", "fsdp", "tensor")
"""The axes of every mesh. An axis that is not used has the size 1."""

BATCH_AXES = ("data", "fsdp")
"""The axes that split a batch."""

MeshName: TypeAlias = Literal["dp", "fsdp", "tp", "fsdp+tp"]

Spec: TypeAlias = tuple[str | tuple[str, ...] | None, ...]
"""The mesh axes of each axis of an array, as in `jax.sharding.PartitionSpec`."""

AxisRule: TypeAlias = str | tuple[str, ...] | None
"""The mesh axes of an array axis of some name; None leaves it whole."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """A mesh of devices, and the rules that split parameters over it.

    A batch is split over the axes `data` and `fsdp`. A parameter is split over `fsdp`, which saves
    memory, and over `tensor`, which also splits the computation. The optimizer state and averages
    of a parameter are split like the parameter.

    Args:
        data: devices that each hold all parameters and a part of the batch; -1 for all devices
            that the other axes leave.
        fsdp: devices that each hold a part of every large parameter and a part of the batch; -1 as
            for `data`.
        tensor: devices that split the last axis of large parameters, and the computation with
            them; -1 as for `data`.
        pipe: devices that each compute a part of the layers, in a model that passes its activations
            on from one to the next by `jax.shard_map`; -1 as for `data`. Only `rules` split
            parameters over this axis.
        rules: pairs of a shell pattern for the paths of parameters, such as `"*/kernel"`, and the
            mesh axis of each array axis, such as `(None, "tensor")`. The first pattern that
            matches decides; `()` replicates. Parameters without a rule are split automatically:
            the last axis over `tensor`, and the largest axis that divides over `fsdp`.
        axis_rules: the mesh axis of each axis name of the model, such as `{"embed": "fsdp", "mlp":
            "tensor", "heads": None}`, or pairs; None leaves an axis whole. Names come from
            `nn.with_logical_partitioning`, `nn.with_partitioning` or `nnx.with_partitioning`.
            Earlier rules come first: each mesh axis splits one axis of a parameter, and a second
            rule for a name applies where the first one's mesh axis is in use. `rules` come before
            names. Empty to ignore names.
        min_size: number of values from which a parameter without a rule is split.
        max_replicated: the largest share of the parameters' bytes that may stay whole on each
            device under `fsdp`. It does not apply to less than 1 MiB.
        offload: "optimizer" keeps the optimizer's state and averages of the weights in host memory
            between steps, except arrays of fewer than `min_size` values. Each step copies them to
            the device and back. None to disable.
        pin: whether the activations are kept split by batch in the forward pass. Without it, XLA
            may gather whole activations on every device.

    Raises:
        ConfigError: a value is out of range, or a rule is not a pair of a pattern, or a name, and
            axes.
    """

    data: int = -1
    _: KW_ONLY
    fsdp: int = 1
    tensor: int = 1
    pipe: int = 1
    rules: tuple[tuple[str, Spec], ...] = ()
    axis_rules: tuple[tuple[str, AxisRule], ...] = ()
    min_size: int = 1024
    max_replicated: float = 0.05
    offload: Literal["optimizer"] | None = None
    pin: bool = True

    def __post_init__(self) -> None:
        for axis, size in self.sizes.items():
            if size != -1:
                whole(f"{axis} of a MeshConfig", size, 1)
        open_axes = [axis for axis, size in self.sizes.items() if size == -1]
        if len(open_axes) > 1:
            raise ConfigError(
                f"Only one axis of a MeshConfig can be -1, but {' and '.join(open_axes)} are. Give "
                "all but one a number of devices."
            )
        whole("min_size of a MeshConfig", self.min_size, 1)
        if not 0 <= self.max_replicated <= 1:
            raise ConfigError(
                "max_replicated of a MeshConfig must be a share from 0 to 1; got "
                f"{self.max_replicated!r}."
            )
        if self.offload not in (None, "optimizer"):
            raise ConfigError(
                f"offload of a MeshConfig must be 'optimizer' or None; got {self.offload!r}."
            )
        rules = tuple(_rule(each) for each in _items("rules", self.rules))
        by_name = tuple(_axis_rule(each) for each in _items("axis_rules", self.axis_rules))
        object.__setattr__(self, "rules", rules)
        object.__setattr__(self, "axis_rules", by_name)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis of the mesh, -1 if it depends on the number of devices."""
        return {axis: getattr(self, axis) for axis in AXES}

    def mesh(self, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
        """Returns the mesh.

        Args:
            devices: the devices; by default all devices of all processes.

        Raises:
            ConfigError: there are too few devices, or their number does not divide.
        """
        devices = planned_devices() if devices is None else devices
        devices = jax.devices() if devices is None else devices
        sizes, count = self.sizes, len(devices)
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if fixed > count or (-1 in sizes.values() and count % fixed):
            shown = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
            raise ConfigError(
                f"A mesh with {shown} does not fit {count} {devices[0].platform} devices. Use "
                "sizes whose product divides that number, or try it with simulate_devices=8."
            )
        shape = [count // fixed if size == -1 else size for size in sizes.values()]
        kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
        chosen = np.array(devices[: math.prod(shape)]).reshape(shape)
        return jax.sharding.Mesh(chosen, AXES, axis_types=kinds)


def as_mesh(name: str, value: Any) -> Any:
    """Checks that a value is the name of a mesh, a `MeshConfig`, or None."""
    if value is None or isinstance(value, MeshConfig) or value in list(_PRESETS):
        return value
    raise ConfigError(
        f"{name} must be one of {', '.join(map(repr, _PRESETS))}, a distaff.MeshConfig, or None; "
        f"got {value!r}."
    )


def mesh_of(value: MeshName | MeshConfig) -> MeshConfig:
    """Returns the `MeshConfig` of an option."""
    return value if isinstance(value, MeshConfig) else _PRESETS[value]


_EXAMPLES = {
    "rules": "pairs of a pattern and mesh axes, such as (('*/kernel', (None, 'tensor')),)",
    "axis_rules": "a dict of axis names and mesh axes, such as {'embed': 'fsdp', 'mlp': 'tensor'}",
}


def _items(name: str, rules: Any) -> Sequence[Any]:
    if isinstance(rules, Mapping):
        return list(rules.items())
    if not isinstance(rules, tuple | list):
        raise ConfigError(f"{name} of a MeshConfig must be {_EXAMPLES[name]}; got {rules!r}.")
    return rules


def _axis_rule(rule: Any) -> tuple[str, AxisRule]:
    is_pair = isinstance(rule, tuple | list) and len(rule) == 2
    name, axes = rule if is_pair else (None, None)
    axes = tuple(axes) if isinstance(axes, list) else axes
    if not isinstance(name, str) or not isinstance(axes, str | tuple | None):
        raise ConfigError(
            f"axis_rules of a MeshConfig must be {_EXAMPLES['axis_rules']}; got {rule!r} in it."
        )
    _rule((name, (axes,)))
    return name, axes


def _rule(rule: Any) -> tuple[str, Spec]:
    is_pair = isinstance(rule, tuple | list) and len(rule) == 2
    pattern, spec = rule if is_pair else (None, None)
    if not isinstance(pattern, str) or not isinstance(spec, tuple | list):
        raise ConfigError(
            "A rule of a MeshConfig must be a pair of a pattern and mesh axes, such as "
            f"('*/kernel', (None, 'tensor')); got {rule!r}."
        )
    entries = tuple(tuple(each) if isinstance(each, list) else each for each in spec)
    used = [axis for each in entries for axis in axes_of(each)]
    unknown = [axis for axis in used if axis not in AXES]
    if unknown:
        raise ConfigError(
            f"The rule {rule!r} of a MeshConfig names {unknown[0]!r}, which is not an axis of the "
            f"mesh. The axes are {', '.join(map(repr, AXES))}; None leaves an axis whole."
        )
    if len(set(used)) < len(used):
        raise ConfigError(
            f"The rule {rule!r} of a MeshConfig uses a mesh axis twice, but it can split only one "
            "axis of an array. Remove one of them."
        )
    return pattern, entries


def axes_of(entry: Any) -> tuple[Any, ...]:
    """Returns the mesh axes of one axis of an array."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


_PRESETS: Mapping[str, MeshConfig] = {
    "dp": MeshConfig(),
    "fsdp": MeshConfig(1, fsdp=-1),
    "tp": MeshConfig(1, tensor=-1),
    "fsdp+tp": MeshConfig(1, fsdp=-1, tensor=2),
}

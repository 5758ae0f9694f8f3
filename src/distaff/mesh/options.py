"""The options of a trainer that concern several devices."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax

from distaff.core.config.argument import Argument
from distaff.core.config.options import Options, at_least, option, or_none
from distaff.errors import ConfigError
from distaff.execution.allocator import has_started
from distaff.execution.placement import ONE_DEVICE, Placement
from distaff.mesh.config import MeshConfig, MeshName, as_mesh, mesh_of
from distaff.mesh.pins import PinnedModel
from distaff.mesh.placement import OnMesh
from distaff.mesh.planned import is_met
from distaff.models import Model, model_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshOptions(Options):
    """The devices of a run."""

    mesh: Argument[MeshName | MeshConfig | None] = option(
        None,
        """Devices to train on: None for the first one; "dp" splits each batch over all devices
        of all processes, "fsdp" also splits the parameters and the optimizer's state, "tp" splits
        large products instead of the batch, and "fsdp+tp" does both, with two devices per product.
        A `MeshConfig` sets sizes and rules.""",
        check=as_mesh,
        resume="same run",
    )
    simulate_devices: int | None = option(
        None,
        """Number of CPU devices to simulate, to try a mesh without accelerators. Set it before JAX
        starts: in the first trainer of the program, before any JAX array.""",
        check=or_none(at_least(1)),
        resume="same run",
    )


def placement_of(options: MeshOptions) -> Placement:
    """Returns the placement of a run.

    Raises:
        ConfigError: the mesh does not fit the devices.
    """
    return ONE_DEVICE if options.mesh is None else OnMesh(mesh_of(options.mesh))


def pinned(model: Model, options: MeshOptions) -> Model:
    """Returns a model whose activations stay split by batch, if the options ask for a mesh."""
    if options.mesh is None:
        return model
    config = mesh_of(options.mesh)
    mesh = config.mesh()
    # Its forward function must not hold the arrays of a ready-made module.
    is_due = config.pin and mesh.size > 1
    return PinnedModel(model_of(model.apply_fn), mesh) if is_due else model


def has_several_devices(options: MeshOptions) -> bool:
    """Returns whether the options ask for a mesh of more than one device."""
    return options.mesh is not None and mesh_of(options.mesh).mesh().size > 1


def simulate(options: MeshOptions) -> None:
    """Makes JAX start with simulated CPU devices, if the options ask for them.

    Raises:
        ConfigError: JAX has started with fewer devices, or on an accelerator.
    """
    number: Any = options.simulate_devices
    if number is None or is_met():
        return
    if not has_started():
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", number)
        # With fewer threads, collectives of simulated devices can wait for each other for ever.
        os.environ.setdefault("NPROC", str(2 * number))
    elif jax.default_backend() != "cpu" or jax.local_device_count() < number:
        raise ConfigError(
            f"simulate_devices={number} must be set before JAX starts, but JAX has started with "
            f"{jax.local_device_count()} {jax.default_backend()} device(s). Create the trainer "
            "before any JAX array, or call jax.config.update('jax_num_cpu_devices', "
            f"{number}) at the top of the program."
        )

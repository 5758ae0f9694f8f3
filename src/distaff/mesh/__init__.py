"""Training on several devices: a mesh, the shardings of a state, and pinned activations."""

from distaff.mesh.config import MeshConfig
from distaff.mesh.options import (
    MeshOptions,
    has_several_devices,
    pinned,
    placement_of,
    simulate,
)
from distaff.mesh.pins import PinnedModel

__all__ = [
    "MeshConfig",
    "MeshOptions",
    "PinnedModel",
    "has_several_devices",
    "pinned",
    "placement_of",
    "simulate",
]

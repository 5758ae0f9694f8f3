"""Plans a recipe in a process of its own, so that this one's JAX is not affected."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distaff import errors
from distaff.errors import ConfigError, DistaffError
from distaff.mesh import MeshConfig
from distaff.mesh.config import AXES, as_mesh
from distaff.plan.result import TrainingPlan
from distaff.plan.targets import Target, target_of

_CHILD = "distaff.cli.plan"
"""The module that the process runs."""

_COUNT = "--xla_force_host_platform_device_count="


def plan_recipe(
    recipe: str,
    arguments: Sequence[str] = (),
    *,
    target: str,
    mesh: str | MeshConfig | None = None,
    memory: float | None = None,
    batch_size: int | None = None,
    double: bool = False,
) -> TrainingPlan:
    """Plans the training of a recipe on devices that this machine may not have.

    Starts a process that runs the recipe up to its first training, traces the training step from
    shapes, and compiles it for the target. No parameter is created, and nothing is written.

    Args:
        recipe: a name, `file.py:function` or `package.module:function`, as for `distaff fit`.
        arguments: options of the recipe, such as `["--width", "128"]`.
        target: the devices, such as `"cpu:8"`, `"h100:32x8"` (hosts x GPUs) or `"v5e:16x16"`.
        mesh: a preset, a `MeshConfig`, or sizes such as `"fsdp=32,tensor=8"`; None for the mesh of
            the recipe's trainer.
        memory: bytes of memory of each device; the target's by default.
        batch_size: examples in a batch of all devices; the recipe's by default.
        double: whether to plan the step again with each mesh axis of twice the size.

    Raises:
        ConfigError: the target, the mesh or the recipe is unknown or does not fit.
        MissingExtraError: the compiler of the target is not installed.
        DistaffError: the recipe failed.
    """
    there, config = target_of(target), mesh_from(mesh)
    request = {
        "recipe": recipe,
        "arguments": list(arguments),
        "target": target,
        "mesh": dataclasses.asdict(config) if isinstance(config, MeshConfig) else config,
        "memory": memory,
        "batch_size": batch_size,
        "double": double,
    }
    with tempfile.TemporaryDirectory(prefix="distaff-plan-") as folder:
        path = Path(folder) / "answer.json"
        command = [sys.executable, "-m", _CHILD, json.dumps({**request, "answer": str(path)})]
        # What the recipe prints is not part of the plan.
        done = subprocess.run(
            command,
            env=_environment(there.doubled if double else there),
            stdout=sys.stderr.fileno(),
        )
        if not path.exists():
            raise DistaffError(
                f"The process that plans {recipe!r} ended with status {done.returncode}. Its error "
                "is above; without one, the memory of this machine may be too small."
            )
        answer = json.loads(path.read_text())
    if "error" in answer:
        raise getattr(errors, answer["error"], DistaffError)(answer["message"])
    return TrainingPlan.from_json(answer)


def mesh_from(value: Any) -> Any:
    """Returns a preset or a `MeshConfig` from an option, such as `"fsdp=32,tensor=8"`.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(value, Mapping):
        return MeshConfig(**value)
    if not isinstance(value, str) or "=" not in value:
        return as_mesh("mesh", value)
    pairs = [part.partition("=") for part in value.split(",")]
    wrong = [name for name, _, size in pairs if name not in AXES or not re.fullmatch(r"\d+", size)]
    if wrong:
        raise ConfigError(
            f"mesh={value!r} is not a list of sizes of {', '.join(AXES)}, such as "
            "'fsdp=32,tensor=8'. Use that form, or the name of a mesh."
        )
    sizes: dict[str, Any] = {"data": 1, **{name: int(size) for name, _, size in pairs}}
    return MeshConfig(**sizes)


def _environment(target: Target) -> dict[str, str]:
    """Returns the environment of the process: JAX on the CPU, with as many devices as planned."""
    known = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in known if not flag.startswith(_COUNT)]
    if target.chip.platform != "cuda":
        flags.append(f"{_COUNT}{target.num_devices}")
    changes = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags), "DISTAFF_MALLOC": "off"}
    return {**os.environ, **changes}

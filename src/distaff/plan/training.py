"""Plans the training of a trainer: traces and compiles its step, and reads what it needs."""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from typing import Any, NamedTuple

import jax

from distaff.core.typing import Batch
from distaff.core.views.brief import spec
from distaff.data import first_batch, num_examples, training_loader_of
from distaff.errors import ConfigError, DistaffError
from distaff.execution.device_memory import is_out_of_memory, program_bytes
from distaff.mesh import MeshConfig
from distaff.mesh.config import MeshName, mesh_of
from distaff.mesh.planned import Planned, planning
from distaff.plan import advice
from distaff.plan.devices import devices_of
from distaff.plan.growth import GrownPlan, batch_of_all, doublings
from distaff.plan.program.collectives import collectives
from distaff.plan.program.hlo import CompiledProgram
from distaff.plan.program.memory_traffic import memory_traffic
from distaff.plan.program.operations import operations
from distaff.plan.result import TrainingPlan
from distaff.plan.roofline import step_bounds
from distaff.plan.targets import Target, target_of
from distaff.plan.traced import TracedStep, device_bytes, parameters_of, shapes_of, traced_step
from distaff.trainer.module import TrainerModule

_MANY_STEPS = 1_000_000
"""Steps of a run whose length is not known, so that every warm-up fits."""


class _Compiled(NamedTuple):
    """A compiled step, or why it does not compile."""

    program: CompiledProgram | None
    peak: int | None
    temporary: int | None
    verdict: str


class _Step(NamedTuple):
    """A training step to plan: the trainer, shapes of its batch, and the steps for schedules."""

    trainer: TrainerModule
    batch: Batch
    memory: float | None
    steps: tuple[int, int]


def plan_training(
    trainer: TrainerModule,
    data: Any,
    *,
    target: str,
    mesh: MeshName | MeshConfig | None = None,
    memory: float | None = None,
    batch_size: int | None = None,
    steps: tuple[int | None, int | None] = (None, None),
    double: bool = False,
) -> TrainingPlan:
    """Plans the training of a trainer on devices that this machine may not have.

    Traces the training step from shapes and compiles it for the target; no parameter is created,
    and nothing runs. Simulated CPU devices must exist in this process; `plan_recipe` starts one of
    its own instead.

    Args:
        trainer: the trainer; it is not changed.
        data: a loader, arrays, or one batch of shapes (`jax.ShapeDtypeStruct`).
        target: the devices, such as `"cpu:8"`, `"h100:32x8"` (hosts x GPUs) or `"v5e:16x16"`.
        mesh: the mesh; None for that of the trainer.
        memory: bytes of memory of each device; the target's by default.
        batch_size: examples in a batch of all devices; as in `data` by default.
        steps: the steps of the run and of an epoch, for schedules; None if they are unknown.
        double: whether to plan the step again with each mesh axis of twice the size.

    Raises:
        DistaffError: the target is unknown, its compiler is missing, or the mesh does not fit.
    """
    there = target_of(target)
    trainer = trainer if mesh is None else _on(trainer, mesh, there)
    found = _batch_of(trainer, data)
    batch = shapes_of(found, batch_size, num_examples(found))
    known = steps[0] or _MANY_STEPS, steps[1] or 1000
    step = _Step(trainer, batch, memory, known)
    plan = _planned(step, there)
    return dataclasses.replace(plan, doubled=_doubled(step, there, plan)) if double else plan


def _planned(step: _Step, target: Target) -> TrainingPlan:
    trainer, batch, devices = step.trainer, step.batch, devices_of(target)
    start = time.perf_counter()
    traced = traced_step(trainer, batch, devices, step.steps)
    seconds = {"trace": time.perf_counter() - start}
    compiled = _compiled(traced, target, seconds)
    source, program = _traffic(step, target, compiled)
    start = time.perf_counter()
    fields = _read(traced, compiled, program, target, source)
    fields["warnings"] = (*_of_the_mesh(trainer, devices), *fields["warnings"])
    seconds["read"] = time.perf_counter() - start
    return TrainingPlan(
        name=type(trainer).__name__,
        batch=spec(batch),
        num_examples=num_examples(batch),
        memory_bytes=target.chip.memory if step.memory is None else int(step.memory),
        seconds=seconds,
        host_bytes=_host_bytes(),
        jax=jax.__version__,
        **fields,
    )


def _doubled(step: _Step, target: Target, plan: TrainingPlan) -> tuple[GrownPlan, ...]:
    """Returns the plans with one axis of twice the size, or why an axis cannot grow."""
    option = step.trainer.config.mesh
    config = MeshConfig(1) if option is None else mesh_of(option)
    found, there = [], target.doubled
    for axis, mesh in doublings(config, plan.mesh):
        size = batch_of_all(axis, plan.num_examples)
        batch = shapes_of(step.batch, size, plan.num_examples)
        try:
            grown = step._replace(trainer=_on(step.trainer, mesh, there), batch=batch)
            found.append(_planned(grown, there).brief(axis))
        except DistaffError as error:
            found.append(
                GrownPlan(
                    axis=axis,
                    size=mesh.sizes[axis],
                    target=there.text,
                    num_devices=2 * plan.num_devices,
                    num_examples=size,
                    failure=str(error),
                )
            )
    return tuple(found)


def _on(trainer: TrainerModule, mesh: MeshName | MeshConfig, target: Target) -> TrainerModule:
    """Returns the trainer with a mesh, which need not fit the devices of this machine."""
    with planning(Planned(devices_of(target))):
        return trainer.variant(mesh=mesh)


def _batch_of(trainer: TrainerModule, data: Any) -> Batch:
    leaves = jax.tree.leaves(data)
    if leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return data
    loader = training_loader_of(data, trainer.config, seed=trainer.config.seed)
    return first_batch(loader, name="train")


def _of_the_mesh(trainer: TrainerModule, devices: list[Any]) -> tuple[str, ...]:
    if trainer.config.mesh is not None or len(devices) == 1:
        return ()
    return (
        f'Without a mesh, one of the {len(devices)} devices is used. Choose one, such as "fsdp".',
    )


def _compiled(traced: TracedStep, target: Target, seconds: dict[str, float]) -> _Compiled:
    start = time.perf_counter()
    lowered = traced.traced.lower()
    seconds["lower"] = time.perf_counter() - start
    start = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=_options(target))
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return _Compiled(None, None, None, _verdict(str(error)))
    finally:
        seconds["compile"] = time.perf_counter() - start
    memory, peak = compiled.memory_analysis(), program_bytes(compiled)
    if target.chip.platform == "tpu":
        # By this figure the compiler decides whether a program fits; the sum may be 28 % more.
        peak = memory.peak_memory_in_bytes
    temporary = memory.temp_size_in_bytes
    return _Compiled(CompiledProgram(compiled.as_text()), peak, temporary, "")


def _options(target: Target) -> dict[str, Any] | None:
    """Returns options of XLA.

    On JAX 0.10, its CPU compiler undoes rematerialization, which accelerators do not.
    """
    stands_for_others = target.chip.platform == "cpu" and target.num_devices > 1
    return {"xla_disable_hlo_passes": "cse_barrier_expander"} if stands_for_others else None


def _verdict(text: str) -> str:
    """Returns the sentence of a compiler about the memory that a program needs."""
    found = re.search(r"[^.]*(?:exceeds|xceeded|out of memory|Out of memory)[^\n]*", text)
    return f"The compiler says: {(found[0] if found else text.splitlines()[0]).strip()}"


def _traffic(
    step: _Step, target: Target, compiled: _Compiled
) -> tuple[str, CompiledProgram | None]:
    """Returns the program from which exchanges are read, and its target.

    The text of a program for a TPU has no lengths of loops, and splits exchanges into many.
    """
    if target.chip.platform != "tpu":
        return target.text, compiled.program
    there = target_of(f"cpu:{target.num_devices}")
    try:
        devices = devices_of(there)
    except ConfigError:
        return there.text, None
    again = _compiled(traced_step(step.trainer, step.batch, devices, step.steps), there, {})
    return there.text, again.program


def _read(
    traced: TracedStep,
    compiled: _Compiled,
    program: CompiledProgram | None,
    target: Target,
    source: str,
) -> dict[str, Any]:
    """Returns the fields of a plan that come from the compiled step."""
    mesh = dict(traced.mesh.shape)
    params = parameters_of(traced.state.params)
    exchanges = [] if program is None else collectives(program, mesh, target.per_host)
    count = operations(traced.traced.jaxpr)
    number = traced.mesh.devices.size
    flops = {dtype: size / number for dtype, size in count.items()}
    moved = 0 if program is None else memory_traffic(program)
    fields: dict[str, Any] = {
        "target": target.text,
        "device": target.chip.title,
        "num_devices": number,
        "mesh": mesh,
        "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(traced.state.params)),
        "parameters": params,
        "parameter_bytes": sum(each.device_bytes for each in params),
        "state_bytes": device_bytes(traced.state),
        "peak_bytes": compiled.peak,
        "temporary_bytes": compiled.temporary,
        "verdict": compiled.verdict,
        "is_upper_bound": target.chip.platform == "cpu" and number > 1,
        "collectives": tuple(exchanges),
        "traffic_from": source,
        "memory_traffic": moved,
        "flops": flops,
        "times": step_bounds(target.chip, flops, moved, exchanges),
    }
    warnings = [*advice.whole_parameters(params, mesh)]
    warnings += advice.vocabulary_lookups(params, exchanges)
    warnings += advice.resharded(exchanges)
    if program is not None:
        size = num_examples(traced.batch)
        warnings += advice.gathered_activations(
            program, traced.traced.jaxpr, size, mesh, traced.config
        )
        if program.unknown_loops or count.unknown_loops:
            warnings.append(
                "The program has loops of unknown length (jax.lax.while_loop), which count once: "
                "FLOPs, traffic and times are too low."
            )
    return {**fields, "warnings": warnings}


def _host_bytes() -> int:
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most

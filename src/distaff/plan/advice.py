"""Warnings of a plan: arrays that stay whole, and exchanges that a rule would avoid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax.extend.core import jaxprs_in_params

from distaff.core.views.amounts import byte_text
from distaff.mesh import MeshConfig
from distaff.mesh.config import BATCH_AXES
from distaff.plan.program.collectives import Collective
from distaff.plan.program.hlo import CompiledProgram
from distaff.plan.result import Parameter

LARGE = 2**20
"""Bytes from which an array, or what is exchanged in a step, is worth a warning."""

_MOST = 4


def whole_parameters(parameters: Sequence[Parameter], mesh: Mapping[str, int]) -> Iterator[str]:
    """Yields a warning for each large parameter that is whole on every device."""
    axis = next((name for name in ("fsdp", "tensor") if mesh[name] > 1), None)
    if axis is None:
        return
    for each in parameters:
        if each.spec or each.device_bytes < LARGE:
            continue
        rule = _rule(each, axis, mesh[axis])
        remedy = (
            f"Split it: MeshConfig(rules=(({each.path!r}, {rule!r}),))."
            if rule
            else f"Give it an axis that {mesh[axis]} divides."
        )
        size = byte_text(each.device_bytes)
        yield f"{each.path!r} {list(each.shape)} is whole on every device: {size}. {remedy}"


def _rule(each: Parameter, axis: str, number: int) -> tuple[Any, ...]:
    divisible = [n for n, size in enumerate(each.shape) if size % number == 0]
    if not divisible:
        return ()
    split = max(divisible, key=lambda n: each.shape[n])
    return tuple([None] * split + [axis])


def vocabulary_lookups(
    parameters: Sequence[Parameter], found: Sequence[Collective]
) -> Iterator[str]:
    """Yields a warning for each embedding that is split, and looked up, across its entries."""
    for each in parameters:
        path = each.path.lower()
        axis = each.spec.strip("()'").split("'")[0]
        if "embed" not in path or len(each.shape) != 2 or not each.spec.startswith("('"):
            continue
        module = each.path.split("/")[-2] if "/" in each.path else each.path
        lookups = [c for c in found if module in c.source and c.num_bytes >= LARGE]
        size = sum(c.num_bytes for c in lookups)
        if lookups:
            yield (
                f"{each.path!r} is looked up across its {each.shape[0]:,} entries: "
                f"{byte_text(size)} are exchanged. To split its features instead: "
                f"MeshConfig(rules=(({each.path!r}, (None, {axis!r})),)). Compare both plans."
            )


def resharded(found: Sequence[Collective]) -> Iterator[str]:
    """Yields a warning for each large exchange that XLA inserts to change a sharding."""
    kinds = ("all-to-all", "collective-permute")
    large = [each for each in found if each.kind in kinds and each.num_bytes >= LARGE]
    for each in large[:_MOST]:
        line = f" at {each.line}" if each.line else ""
        yield (
            f"XLA changes the sharding of {each.shape} in {each.source}{line}: "
            f"{byte_text(each.num_bytes)} by {each.kind}. Split the arrays of this operation "
            "along the same axes, by rules of the MeshConfig or "
            "jax.lax.with_sharding_constraint in the model."
        )


def gathered_activations(
    program: CompiledProgram,
    jaxpr: Any,
    num_examples: int,
    mesh: Mapping[str, int],
    config: MeshConfig,
) -> Iterator[str]:
    """Yields a warning for each large activation that every device holds for the whole batch.

    Args:
        program: the compiled step.
        jaxpr: the step, whose values have their whole shapes.
        num_examples: examples of a batch of all devices.
        mesh: sizes of the mesh axes.
        config: the rules of the mesh.
    """
    if math.prod(mesh[axis] for axis in BATCH_AXES) == 1:
        return
    inputs = {tuple(var.aval.shape) for var in getattr(jaxpr, "jaxpr", jaxpr).invars}
    global_shapes = {
        shape for shape in _shapes(jaxpr) if len(shape) > 1 and shape[0] == num_examples
    } - inputs
    found: dict[tuple[int, ...], tuple[int, str]] = {}
    for each, _, _, is_fused in program.occurrences:
        for shape in each.shapes if not is_fused else ():
            if shape.sizes in global_shapes and shape.num_bytes >= LARGE:
                found.setdefault(shape.sizes, (shape.num_bytes, each.op_name))
    largest = sorted(found.items(), key=lambda item: -item[1][0])[:_MOST]
    remedy = "Set pin=True in the MeshConfig."
    if config.pin:
        remedy = "Keep it split by batch with jax.lax.with_sharding_constraint in the model."
    for sizes, (num_bytes, op_name) in largest:
        where = f" ({op_name})" if op_name else ""
        yield (
            f"An array {list(sizes)} of the whole batch is on every device{where}: "
            f"{byte_text(num_bytes)}. {remedy}"
        )


def _shapes(jaxpr: Any) -> set[tuple[int, ...]]:
    found: set[tuple[int, ...]] = set()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        found.update(
            tuple(var.aval.shape) for var in equation.outvars if hasattr(var.aval, "shape")
        )
        for inner in jaxprs_in_params(equation.params):
            found |= _shapes(inner)
    return found

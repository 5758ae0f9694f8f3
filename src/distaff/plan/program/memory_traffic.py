"""The bytes that a compiled program reads from and writes to the memory of a device."""

from __future__ import annotations

from collections.abc import Mapping

from distaff.plan.program.collectives import KINDS
from distaff.plan.program.hlo import CompiledProgram, Instruction, called

_FREE = frozenset(
    (
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
        *("while", "call", "conditional", "partition-id", "replica-id", "iota", "copy-start"),
        *("async-start", "async-update", "async-done", "opt-barrier", "domain", "broadcast"),
    )
)
"""Operations that move nothing by themselves."""


def memory_traffic(program: CompiledProgram) -> int:
    """Returns the bytes that one call of a program reads and writes on one device.

    Each instruction reads its operands and writes its results once; a fusion that uses only a
    slice of an operand, as the body of a loop does, reads that slice. Caches are not considered.
    """
    total = 0
    for each, computation, times, is_fused in program.occurrences:
        kind = each.opcode.removesuffix("-start").removesuffix("-done")
        if not (is_fused or each.opcode in _FREE or kind in KINDS):
            total += times * _moved(program, each, computation)
    return total


def _moved(
    program: CompiledProgram, each: Instruction, computation: Mapping[str, Instruction]
) -> int:
    operands = [computation[name] for name in each.operands if name in computation]
    if each.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * each.num_bytes
    if each.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * sum(operand.num_bytes for operand in operands[1:])
    if each.opcode != "fusion":
        return each.num_bytes + sum(operand.num_bytes for operand in operands)
    inner = program.computations.get(next(iter(called(each)), ""), {})
    read = sum(_read(inner, n, operand) for n, operand in enumerate(operands))
    return read + _written(inner, each)


def _read(inner: Mapping[str, Instruction], number: int, operand: Instruction) -> int:
    """Returns the bytes that a fusion reads of an operand."""
    name = next((x.name for x in inner.values() if _is_parameter(x, number)), None)
    uses = [x for x in inner.values() if name in x.operands]
    if uses and all(x.opcode == "dynamic-slice" and x.operands[0] == name for x in uses):
        return sum(use.num_bytes for use in uses)
    if uses and all(x.opcode == "dynamic-update-slice" and x.operands[0] == name for x in uses):
        return 0  # updated in place
    return operand.num_bytes


def _written(inner: Mapping[str, Instruction], each: Instruction) -> int:
    root = next((x for x in inner.values() if x.is_root), None)
    while root is not None and root.opcode in ("bitcast", "copy", "convert"):
        root = inner.get(next(iter(root.operands), ""))
    if root is not None and root.opcode == "dynamic-update-slice":
        return sum(inner[x].num_bytes for x in root.operands[1:2] if x in inner)
    return each.num_bytes


def _is_parameter(each: Instruction, number: int) -> bool:
    return each.opcode == "parameter" and each.attributes.partition(",")[0].strip() == str(number)

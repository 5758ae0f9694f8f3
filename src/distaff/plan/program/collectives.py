"""The traffic between devices of a compiled program."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import flax
import jax
import numpy as np
import optax

from distaff.plan.program.hlo import CompiledProgram, Instruction

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"),
    *("ragged-all-to-all", "collective-broadcast"),
)
"""The operations that exchange arrays between devices."""

_LISTS = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}\s]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
    r"\{([^}]*)\}"
)
_AXIS = re.compile(r"'(\w+)'=(\d+)")
_DERIVATIVE = re.compile(r"(?:transpose\()?jvp\([\w.]*\)\)?/?")
_CONTROL = ("while", "body", "cond", "closed_call", "branch_0_fun", "branch_1_fun", "shard_map")
_MOST_LETTERS = 70
_DISTAFF = Path(__file__).parents[2]
_OWN_MODELS = tuple(str(_DISTAFF / name) + os.sep for name in ("zoo", "tasks"))
_LIBRARIES = (
    *(str(Path(each.__file__).parent) + os.sep for each in (jax, flax, optax)),
    *(str(Path(os.__file__).parent) + os.sep, "<"),
)


class Collective(NamedTuple):
    """Exchanges of one kind, over the same mesh axes, from one operation of the model.

    Attributes:
        kind: such as `"all-gather"`.
        axes: the mesh axes whose devices exchange; empty if they are unknown.
        num_devices: devices that exchange with each other.
        num_hosts: hosts that these devices are in.
        count: number of exchanges in one step.
        num_bytes: bytes per device in one step: what a gather returns, and what a sum takes.
        source: the operation of the model, such as `"GPT/head/dot_general (backward)"`.
        line: the file and line of the model; empty if unknown.
        shape: dtype and sizes of the largest array.
    """

    kind: str
    axes: tuple[str, ...]
    num_devices: int
    num_hosts: int
    count: int
    num_bytes: int
    source: str
    line: str
    shape: str

    @property
    def over(self) -> str:
        """The mesh axes as text, such as `"data+fsdp"`."""
        return "+".join(self.axes) or "other groups"

    @property
    def sent_bytes(self) -> float:
        """The bytes that each device sends, if they pass along a ring."""
        share = (self.num_devices - 1) / max(1, self.num_devices)
        twice = 2 if self.kind == "all-reduce" else 1
        return self.num_bytes * (1 if self.kind == "collective-permute" else share * twice)


def collectives(
    program: CompiledProgram, mesh: Mapping[str, int], per_host: int
) -> list[Collective]:
    """Returns the exchanges of one call of a program, the largest first.

    Args:
        program: the program.
        mesh: the sizes of the mesh axes, in the order of the devices.
        per_host: devices of a host.
    """
    found: dict[tuple, Collective] = {}
    for each, _, times, _ in program.occurrences:
        kind = each.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        group = group_of(each.attributes, math.prod(mesh.values()))
        if len(group) == 1:
            continue
        shapes = exchanged(kind, each)
        size = sum(shape.num_bytes for shape in shapes)
        size *= len(group) if kind == "reduce-scatter" else 1
        largest = max(shapes, key=lambda shape: shape.num_bytes)
        num_hosts = len({device // per_host for device in group})
        one = Collective(
            kind,
            axes_of_group(group, mesh),
            len(group),
            num_hosts,
            times,
            times * size,
            source_of(each.op_name),
            _line(program, each),
            f"{largest.dtype}[{','.join(map(str, largest.sizes))}]",
        )
        key = one.kind, one.axes, one.num_devices, one.source
        other = found.get(key)
        if other is not None:
            one = one._replace(
                count=one.count + other.count, num_bytes=one.num_bytes + other.num_bytes
            )
        found[key] = one
    return sorted(found.values(), key=lambda each: -each.num_bytes)


def exchanged(kind: str, each: Instruction) -> list:
    """Returns the shapes of the results. An async start also lists its operands before them."""
    number, shapes = len(each.operands), list(each.shapes)
    if each.opcode != kind and kind != "all-reduce" and len(shapes) >= 2 * number:
        return shapes[number : 2 * number]
    return shapes[:number] if number else shapes


def group_of(attributes: str, num_devices: int) -> tuple[int, ...]:
    """Returns the first group of devices that exchange with each other."""
    if found := _MESH.search(attributes):
        axes = [(name, int(size)) for name, size in _AXIS.findall(found[1])]
        ids = _ids(found[2] or ",".join(str(size) for _, size in axes), found[3])
        ids = ids.reshape([size for _, size in axes])
        used = set(re.findall(r"'(\w+)'", found[4]))
        return tuple(ids[tuple(slice(None) if n in used else 0 for n, _ in axes)].ravel().tolist())
    if found := _IOTA.search(attributes):
        shape = [int(size) for size in found[1].split(",")]
        return tuple(_ids(found[2], found[3]).reshape(shape)[0].tolist())
    if found := _LISTS.search(attributes):
        groups = [
            [int(number) for number in group.split(",") if number.strip()]
            for group in re.findall(r"\{([\d,\s]*)\}", found[1])
        ]
        if "source_target_pairs" not in found[0]:
            return tuple(groups[0]) or tuple(range(num_devices))
        return _connected([pair for pair in groups if len(pair) == 2])
    return tuple(range(num_devices))


def _ids(sizes: str, order: str | None) -> np.ndarray:
    shape = [int(size) for size in sizes.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(axis) for axis in order.split(",")]) if order else ids


def _connected(pairs: list[list[int]]) -> tuple[int, ...]:
    """Returns the devices that are reached from the first one."""
    reached = {pairs[0][0]} if pairs else set()
    while more := {b for pair in pairs for a in pair for b in pair if a in reached} - reached:
        reached |= more
    return tuple(sorted(reached))


def axes_of_group(group: tuple[int, ...], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes along which a group of devices differs, or nothing if unknown."""
    sizes = tuple(mesh.values())
    if not group or max(group) >= math.prod(sizes):
        return ()
    places = np.array(np.unravel_index(np.array(group), sizes))
    return tuple(name for name, row in zip(mesh, places, strict=True) if len(set(row.tolist())) > 1)


def source_of(op_name: str) -> str:
    """Returns the module and the operation in a name of XLA, and whether it is the backward pass.

    >>> source_of("jit(step)/transpose(jvp(distaff.loss))/GPT/while/body/blocks/up/dot_general")
    'GPT/blocks/up/dot_general (backward)'
    """
    is_backward = "transpose(" in op_name
    parts: list[str] = []
    for piece in _DERIVATIVE.sub("", op_name).split("/"):
        is_call = re.match(r"(jit|vmap|rematted_computation|checkpoint)\b", piece)
        if not is_call and piece not in _CONTROL and not piece.endswith(".body"):
            parts.append(piece)
    where = "/".join(parts) or "another operation"
    where = where if len(where) <= _MOST_LETTERS else f"{where[: _MOST_LETTERS - 3]}..."
    return f"{where} (backward)" if is_backward else where


def _line(program: CompiledProgram, each: Instruction) -> str:
    for file, line in program.lines_of(each):
        is_own = file.startswith(_OWN_MODELS) or not file.startswith(str(_DISTAFF) + os.sep)
        if is_own and not file.startswith(_LIBRARIES):
            return f"{file.removeprefix(os.getcwd() + os.sep)}:{line}"
    return ""

"""Reads the text of a compiled program: instructions, how often they run, and where they are."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_TABLE = re.compile(r"^(FileNames|FunctionNames|FileLocations|StackFrames)$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_LEAF = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"\b(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")

_ENTERED = ("while", "call", "conditional", "fusion", "async-start")


class Shape(NamedTuple):
    """The dtype and the sizes of an array on one device."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The bytes of the array."""
        return -(-math.prod(self.sizes) * _num_bits(self.dtype) // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
        name: its name, without `%`.
        opcode: the operation, such as `"fusion"`.
        shapes: its results; of an async start, also its operands.
        operands: names of its operands.
        attributes: the rest of the line.
        is_root: whether it is the result of its computation.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool = False

    @property
    def num_bytes(self) -> int:
        """The bytes of all its shapes."""
        return sum(shape.num_bytes for shape in self.shapes)

    @property
    def op_name(self) -> str:
        """The operation of the model that it was compiled from; empty if unknown."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""


class Occurrence(NamedTuple):
    """An instruction that runs.

    Attributes:
        instruction: the instruction.
        computation: its computation.
        times: how often it runs in one call of the program.
        is_fused: whether it is inside a fusion.
    """

    instruction: Instruction
    computation: Mapping[str, Instruction]
    times: int
    is_fused: bool


class CompiledProgram:
    """A compiled program.

    Args:
        text: the result of `compiled.as_text()`.

    Attributes:
        computations: instructions by name, by name of their computation.
        unknown_loops: number of loops whose length is not known. They count once.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self._entry, self._tables = "", {"": {}}
        self.unknown_loops = 0
        self._read(text)

    def _read(self, text: str) -> None:
        table, current = self._tables[""], {}
        for line in text.splitlines():
            if not line.startswith(" "):
                header = _HEADER.match(line)
                if header:
                    current = self.computations.setdefault(header[2], {})
                    self._entry = header[2] if header[1] else self._entry
                elif _TABLE.match(line):
                    table = self._tables.setdefault(line, {})
                elif line[:1].isdigit():
                    number, _, rest = line.partition(" ")
                    table[int(number)] = rest
            elif (read := instruction(line)) is not None:
                current[read.name] = read

    @functools.cached_property
    def occurrences(self) -> list[Occurrence]:
        """Each instruction that runs, with the number of times."""
        self.unknown_loops = 0
        return list(self._walk(self._entry, 1, False))

    def _walk(self, name: str, times: int, is_fused: bool) -> Iterator[Occurrence]:
        computation = self.computations.get(name, {})
        for each in computation.values():
            yield Occurrence(each, computation, times, is_fused)
            if each.opcode not in _ENTERED:
                continue
            trips = 1
            if each.opcode == "while":
                found = _TRIPS.search(each.attributes)
                trips = int(found[1]) if found else 1
                self.unknown_loops += found is None
            for inner in called(each):
                yield from self._walk(inner, times * trips, is_fused or each.opcode == "fusion")

    def lines_of(self, each: Instruction) -> Iterator[tuple[str, int]]:
        """Yields the files and lines that an instruction comes from, the innermost one first."""
        found = _FRAME.search(each.attributes)
        number = int(found[1]) if found else 0
        frames = self._tables.get("StackFrames", {})
        while number in frames:
            fields = _fields(frames[number])
            location = _fields(self._tables["FileLocations"].get(fields["file_location_id"], ""))
            file = self._tables["FileNames"].get(location.get("file_name_id", 0), "")
            yield file.strip('"'), location.get("line", 0)
            number = min(fields.get("parent_frame_id", 0) - 1, number - 1)


def instruction(line: str) -> Instruction | None:
    """Returns the instruction of a line, or None."""
    name = _NAME.match(line)
    if name is None:
        return None
    rest = line[name.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = len(opcode) + _closing(rest[len(opcode) :]) + 1
    operands = rest[len(opcode) : end]
    shapes = tuple(Shape(*_leaf(found)) for found in _LEAF.finditer(kind))
    return Instruction(
        name[2],
        opcode,
        shapes,
        tuple(_OPERAND.findall(operands)),
        operands[1:-1] + rest[end:] if opcode in ("parameter", "constant") else rest[end:],
        is_root=bool(name[1]),
    )


def called(each: Instruction) -> list[str]:
    """Returns the names of the computations that an instruction runs."""
    found = _CALLED.findall(each.attributes)
    for branches in _BRANCHES.findall(each.attributes):
        found += [name.strip(" %") for name in branches.split(",")]
    if each.opcode == "while":
        found += _CONDITION.findall(each.attributes)
    return found


def _leaf(found: re.Match[str]) -> tuple[str, tuple[int, ...]]:
    sizes = tuple(int(size.lstrip("<=")) for size in found[2].split(",") if size)
    return found[1], sizes


def _closing(text: str) -> int:
    """Returns the position of the parenthesis that closes the first one."""
    depth = 0
    for position in (match.start() for match in re.finditer(r"[()]", text)):
        depth += 1 if text[position] == "(" else -1
        if depth == 0:
            return position
    return len(text)


def _fields(text: str) -> dict[str, int]:
    return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", text)}


@functools.cache
def _num_bits(dtype: str) -> int:
    if dtype in ("token", "opaque"):
        return 0
    if dtype == "pred":
        return 8
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 32

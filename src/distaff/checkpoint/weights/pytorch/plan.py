"""Which tensors a PyTorch model has for the arrays of a model, and how they are stored."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distaff.checkpoint.weights.names import named, parts
from distaff.checkpoint.weights.pytorch.layers import LayerArray, TensorName, members
from distaff.checkpoint.weights.pytorch.layouts import UNKNOWN, Layout, Shape, layout_of, transposed
from distaff.checkpoint.weights.pytorch.modules import Modules
from distaff.checkpoint.weights.pytorch.rules import TorchRules
from distaff.checkpoint.weights.source import is_random_key
from distaff.errors import ConfigError
from distaff.models import Variables

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_KNOWN = ("weight", "bias", "mean", "var")
_STATISTICS = {"mean": "running_mean", "var": "running_var"}


class TensorRange(NamedTuple):
    """A range of the outputs of a tensor, along one axis."""

    tensor: str
    start: int
    stop: int
    axis: int


class Slot(NamedTuple):
    """An array of the model.

    Attributes:
        shape: its shape; of one layer, if layers are stacked.
        layout: its layout in PyTorch.
        parts: the parts of tensors that are summed, for each of the stacked layers. In an export
            the first one gets the array, and the others zeros.
        num_layers: number of stacked layers; None for an array of one layer.
    """

    shape: Shape
    layout: Layout
    parts: tuple[TensorRange, ...]
    num_layers: int | None

    @property
    def by_layer(self) -> list[tuple[TensorRange, ...]]:
        """The parts of each layer."""
        size = len(self.parts) // (self.num_layers or 1)
        return [self.parts[n : n + size] for n in range(0, len(self.parts), size)]


class TorchPlan(NamedTuple):
    """The tensors of a PyTorch model, and the arrays of a model made from them.

    Attributes:
        slots: the arrays by name.
        tensors: shape of each tensor by name.
        ready: arrays that only correct running statistics: the name of the mean, and the value
            for statistics that need no correction.
        modules: the model's modules.
    """

    slots: Mapping[str, Slot]
    tensors: Mapping[str, Shape]
    ready: Mapping[str, tuple[str, np.ndarray]]
    modules: Modules


class _Claim(NamedTuple):
    """An array's claim to a part of a tensor."""

    name: str
    layout: Layout
    piece: TensorName
    axis: int


def make_plan(variables: Variables, modules: Modules, rules: TorchRules) -> TorchPlan:
    """Returns the plan for a model.

    Args:
        variables: the model's arrays, or their shapes.
        modules: the model's modules.
        rules: names in PyTorch.

    Raises:
        ConfigError: a name leads to no array, two arrays to one tensor, or PyTorch has no such
            layer.
    """
    leaves = {name: x for name, x in named(variables).items() if not is_random_key(x)}
    shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    paths = _paths(shapes, variables, modules)
    rules.check_used(paths.values())
    stacked = _stacked(paths, shapes, rules)
    shapes = {name: shape[1:] if name in stacked else shape for name, shape in shapes.items()}
    by_path = {path: shapes[name] for name, path in paths.items()}
    special = {each.path: each for each in members(by_path, modules.by_path, rules)}
    leaves_of: dict[str, set[str]] = {}
    for path in by_path:
        owner, _, leaf = path.rpartition("/")
        leaves_of.setdefault(owner, set()).add(leaf)
    claims = []
    for name, path in paths.items():
        owner = path.rpartition("/")[0]
        if path in special:
            member = special[path]
        else:
            module = modules.by_path.get(owner, UNKNOWN if modules.by_path else None)
            layout = layout_of(path, shapes[name], leaves_of[owner], module)
            member = _plain(path, shapes[name], layout, leaves_of[owner], rules)
        layers = range(stacked.get(name, 1))
        pieces = [piece.of_layer(n) for n in layers for piece in member.pieces]
        claims += [_claim(name, shapes[name], member, piece, rules) for piece in pieces]
    slots, tensors = _laid_out(claims, shapes, stacked)
    return TorchPlan(slots, tensors, _ready(leaves, modules), modules)


def _stacked(
    paths: Mapping[str, str], shapes: Mapping[str, Shape], rules: TorchRules
) -> dict[str, int]:
    """Returns the number of layers of each array that stacks layers."""
    found = {name: shapes[name] for name, path in paths.items() if rules.place(path).is_stacked}
    if single := [name for name, shape in found.items() if not shape]:
        raise ConfigError(
            f"Stacked layers need an axis of layers; {single[0]!r} is a single number. Write {{}} "
            "on both sides of names for layers that are not stacked."
        )
    return {name: shape[0] for name, shape in found.items()}


def _claim(
    name: str, shape: Shape, member: LayerArray, piece: TensorName, rules: TorchRules
) -> _Claim:
    layout = member.layout
    matches = (fnmatch.fnmatchcase(piece.tensor, pattern) for pattern in rules.inputs_first)
    if len(layout.shape(shape)) == 2 and any(matches):
        return _Claim(name, transposed(layout), piece, 1)
    return _Claim(name, layout, piece, 0)


def _ready(leaves: Mapping[str, Any], modules: Modules) -> dict[str, tuple[str, np.ndarray]]:
    """Returns the values of counters by name, each with the mean that it belongs to."""
    return {
        name: (each.mean, np.asarray(value, leaves[name].dtype))
        for each in modules.statistics
        for name, value in each.ready.items()
    }


def _paths(shapes: Mapping[str, Shape], variables: Variables, modules: Modules) -> dict[str, str]:
    """Returns the path of each array, without its collection, and with its meaning as the leaf."""
    prefixes = [prefix for prefix in parts(variables) if prefix]
    paths = {}
    for name in shapes:
        prefix = next((each for each in prefixes if name.startswith(each)), "")
        paths[name] = name.removeprefix(prefix)
    for each in modules.statistics:
        start = f"{each.path}/" if each.path else ""
        paths[each.mean], paths[each.variance] = f"{start}mean", f"{start}var"
        for name in each.ready:
            del paths[name]
    return paths


def _plain(
    path: str, shape: Shape, layout: Layout, siblings: Collection[str], rules: TorchRules
) -> LayerArray:
    """Returns an array that is one tensor, up to its layout."""
    place = rules.place(path)
    owner, _, leaf = path.rpartition("/")
    if place.is_named:
        if place.name.rpartition(".")[2] != leaf and leaf not in (*_KNOWN, *_LEAVES):
            _check_one_way(path, shape, place.name)
        return LayerArray(path, layout, (TensorName(place.name, place.member),))
    place = rules.place(owner)
    is_norm = {"mean", "var"} <= set(siblings)
    known = {**_LEAVES, **(_STATISTICS if is_norm else {})}
    tensor = ".".join(part for part in (place.name, known.get(leaf, leaf)) if part)
    return LayerArray(path, layout, (TensorName(tensor, place.member),))


def _check_one_way(path: str, shape: Shape, tensor: str) -> None:
    """Checks that an array without a known layout would not have the same shape in another."""
    if len(shape) > 1 and len(set(shape)) == 1:
        raise ConfigError(
            f"The shape of {path!r}, {list(shape)}, does not say whether it is transposed in "
            f"{tensor!r}. Call it 'kernel' in the model if it is [in, out], or 'weight' if it is "
            "[out, in]."
        )


def _laid_out(
    claims: Sequence[_Claim], shapes: Mapping[str, Shape], stacked: Mapping[str, int]
) -> tuple[dict[str, Slot], dict[str, Shape]]:
    """Returns the arrays and tensors, with the members of fused tensors in their order."""
    by_tensor: dict[str, list[_Claim]] = {}
    for claim in claims:
        by_tensor.setdefault(claim.piece.tensor, []).append(claim)
    tensors: dict[str, Shape] = {}
    found: dict[tuple[str, str], TensorRange] = {}
    for tensor, sharing in by_tensor.items():
        sharing = sorted(sharing, key=lambda claim: claim.piece.member)
        _check_members(tensor, sharing, shapes)
        end = 0
        for claim in sharing:
            shape = list(claim.layout.shape(shapes[claim.name]))
            axis = claim.axis
            size = (shape[axis] if shape else 1) if claim.piece.size is None else claim.piece.size
            found[claim.name, tensor] = TensorRange(tensor, end, end + size, axis)
            end += size
        if shape:
            shape[axis] = end
        tensors[tensor] = tuple(shape)
    slots: dict[str, Slot] = {}
    for claim in claims:
        part = found[claim.name, claim.piece.tensor]
        earlier = slots[claim.name].parts if claim.name in slots else ()
        slots[claim.name] = Slot(
            shapes[claim.name], claim.layout, (*earlier, part), stacked.get(claim.name)
        )
    return slots, tensors


def _check_members(tensor: str, claims: list[_Claim], shapes: Mapping[str, Shape]) -> None:
    for one, other in itertools.pairwise(claims):
        forms = [list(claim.layout.shape(shapes[claim.name])) for claim in (one, other)]
        both = f"{one.name!r}, {forms[0]}, and {other.name!r}, {forms[1]}"
        if one.piece.member == other.piece.member:
            raise ConfigError(
                f"Each tensor in PyTorch is one array of the model; {tensor!r} would be both "
                f"{both}. Give one of them another name in TorchRules(names=...)."
            )
        if len(forms[0]) != len(forms[1]) or any(
            one.axis != n and a != b for n, (a, b) in enumerate(zip(*forms, strict=True))
        ):
            raise ConfigError(
                f"The parts of a fused tensor differ in the number of outputs only; {tensor!r} "
                f"would hold {both}. Correct TorchRules(names=...)."
            )

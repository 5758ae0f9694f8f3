"""Converts tensors of PyTorch to a model's arrays, and back, by a plan."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from distaff.checkpoint.weights.pytorch.plan import Slot, TensorRange, TorchPlan
from distaff.checkpoint.weights.pytorch.rules import TorchRules
from distaff.checkpoint.weights.source import ShapeAndDtype, WeightSource
from distaff.errors import CheckpointError

_IGNORED = "num_batches_tracked"
"""A counter of BatchNorm in PyTorch, which only matters under `momentum=None`."""

_EXPLAINED, _CANDIDATES = 20, 1000
"""Maximum number of missing arrays with the nearest names, and of names searched: it is slow."""


def converted(source: WeightSource, plan: TorchPlan, rules: TorchRules) -> WeightSource:
    """Returns a source of the model's arrays, made from one of PyTorch's tensors.

    Args:
        source: the tensors, with the names of a `state_dict`.
        plan: the plan for the model.
        rules: names in PyTorch.
    """
    held = _SourceTensors(source, rules)
    forms: dict[str, ShapeAndDtype] = {}
    wrong: dict[str, str] = {}
    lacking: dict[str, list[str]] = {}
    for name, slot in plan.slots.items():
        absent = [part.tensor for part in slot.parts if held.name(part.tensor) is None]
        if absent:
            lacking[name] = absent
            continue
        held.used.update(held.name(part.tensor) for part in slot.parts)
        others = [_other_form(name, part, plan, held) for part in slot.parts]
        if any(others):
            wrong[name] = "; ".join(filter(None, others))
        else:
            stack = () if slot.num_layers is None else (slot.num_layers,)
            forms[name] = (*stack, *slot.shape), held.form(slot.parts[0].tensor)[1]
    for name, (mean, value) in plan.ready.items():
        if mean in forms:
            forms[name] = (), value.dtype
    unused = held.unused()

    def read(names: Sequence[str]) -> dict[str, np.ndarray]:
        slots = {name: plan.slots[name] for name in names if name in plan.slots}
        tensors = held.read({part.tensor for slot in slots.values() for part in slot.parts})
        arrays = {name: _array(slot, tensors, plan) for name, slot in slots.items()}
        return arrays | {name: plan.ready[name][1] for name in names if name in plan.ready}

    return source._replace(
        forms=forms,
        read=read,
        unused=unused,
        wrong=wrong,
        absent=_explained(lacking, plan, unused),
    )


def tensors_of(
    arrays: Mapping[str, np.ndarray], plan: TorchPlan, rules: TorchRules
) -> dict[str, np.ndarray]:
    """Returns the tensors of a PyTorch model with a model's arrays.

    Where PyTorch sums two biases, the second one is zero.

    Args:
        arrays: the model's arrays by name.
        plan: the plan for the model.
        rules: names in PyTorch.
    """
    arrays = dict(arrays)
    for each in plan.modules.statistics:
        scale = each.scale(arrays)
        for name in (each.mean, each.variance):
            arrays[name] = arrays[name] / arrays[name].dtype.type(scale)
    tensors: dict[str, np.ndarray] = {}
    for name, slot in plan.slots.items():
        for part in slot.parts:
            if part.tensor not in tensors:
                tensors[part.tensor] = np.zeros(plan.tensors[part.tensor], arrays[name].dtype)
        layers = [arrays[name]] if slot.num_layers is None else arrays[name]
        for array, (first, *_) in zip(layers, slot.by_layer, strict=True):
            tensors[first.tensor][_range(first, plan)] = slot.layout.save(array)
    for other, owner in rules.tied.items():
        for one, two in ((other, owner), (owner, other)):
            if one in tensors:
                tensors.setdefault(two, tensors[one])
    return tensors


class _SourceTensors:
    """The tensors of a source, of which two may be the same.

    Attributes:
        used: names in the source that the model has a place for.
    """

    def __init__(self, source: WeightSource, rules: TorchRules) -> None:
        self._source = source
        self._tied = rules.tied
        self._same = {**{owner: other for other, owner in rules.tied.items()}, **rules.tied}
        self.used: set[str | None] = set()

    def name(self, tensor: str) -> str | None:
        """Returns the name in the source of a tensor, which may be that of a tied one."""
        names = (tensor, self._same.get(tensor))
        return next((each for each in names if each in self._source.forms), None)

    def form(self, tensor: str) -> ShapeAndDtype:
        name = self.name(tensor)
        assert name is not None
        return self._source.forms[name]

    def unused(self) -> dict[str, ShapeAndDtype]:
        return {
            name: form
            for name, form in self._source.forms.items()
            if name not in self.used
            and self._same.get(name) not in self.used
            and name.rpartition(".")[2] != _IGNORED
        }

    def read(self, tensors: Collection[str]) -> dict[str, np.ndarray]:
        """Returns tensors by name.

        Raises:
            CheckpointError: tied tensors differ.
        """
        names = {tensor: self.name(tensor) for tensor in tensors}
        twice = {
            other: owner
            for other, owner in self._tied.items()
            if {other, owner} <= self._source.forms.keys()
            and len(self.used & {other, owner}) == 1
            and not {other, owner}.isdisjoint(names.values())
        }
        forms = self._source.forms
        pairs = {
            each for pair in twice.items() if forms[pair[0]] == forms[pair[1]] for each in pair
        }
        wanted = {*names.values(), *pairs}
        values = self._source.read([name for name in wanted if name is not None])
        for other, owner in twice.items():
            if other not in pairs or values[other].tobytes() != values[owner].tobytes():
                raise CheckpointError(
                    f"Tied tensors must be equal; {other!r} and {owner!r} in {self._source.origin} "
                    "differ. Remove them from TorchRules(tied=...), and give the model an array "
                    "for each."
                )
        return {tensor: values[name] for tensor, name in names.items() if name is not None}


def _array(slot: Slot, tensors: Mapping[str, np.ndarray], plan: TorchPlan) -> np.ndarray:
    """Returns an array of the model: the sum of its parts in its layout, for each layer."""
    layers = []
    for first, *others in slot.by_layer:
        total = tensors[first.tensor][_range(first, plan)]
        for part in others:
            addend = tensors[part.tensor][_range(part, plan)]
            total = total.copy()
            total[: len(addend)] += addend.astype(total.dtype)
        layers.append(slot.layout.load(total, slot.shape))
    return layers[0] if slot.num_layers is None else np.stack(layers)


def _range(part: TensorRange, plan: TorchPlan) -> tuple[slice, ...]:
    """Returns the index of a part of its tensor."""
    ndim = len(plan.tensors[part.tensor])
    return (slice(None),) * part.axis + (slice(part.start, part.stop),) if ndim else ()


def _other_form(name: str, part: TensorRange, plan: TorchPlan, held: _SourceTensors) -> str:
    expected, (shape, dtype) = plan.tensors[part.tensor], held.form(part.tensor)
    first = plan.slots[name].parts[0].tensor
    where = f"{held.name(part.tensor)!r} is {dtype}{list(shape)} in the source, and must be"
    if shape != expected:
        whose = f"for {name!r}, {list(plan.slots[name].shape)}"
        return f"other shape: {where} {list(expected)} {whose}"
    if dtype != held.form(first)[1]:
        return f"other dtype: {where} {held.form(first)[1]}, like {first!r}, for {name!r}"
    return ""


def _explained(
    lacking: Mapping[str, list[str]], plan: TorchPlan, unused: Mapping[str, ShapeAndDtype]
) -> dict[str, str]:
    """Returns where missing arrays were looked for, and the nearest names among unused tensors."""
    texts = {}
    for number, (name, tensors) in enumerate(lacking.items()):
        texts[name] = "; ".join(f"no tensor {t!r}, {list(plan.tensors[t])}" for t in tensors)
        if number < _EXPLAINED:
            same = [
                each for each, (shape, _) in unused.items() if shape == plan.tensors[tensors[0]]
            ]
            candidates = (same or list(unused))[:_CANDIDATES]
            close = difflib.get_close_matches(tensors[0], candidates, n=2, cutoff=0.3)
            texts[name] += f" (nearest: {', '.join(map(repr, close))})" if close else ""
    return texts

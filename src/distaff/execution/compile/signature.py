"""Signatures of program arguments, and the differences that cause a recompile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

from distaff.errors import leaf_name

_MAX_NAMED = 4

# Names of the fields of `ChunkData` in messages.
_NAMES = {"source/whole": "batch", "source/": ""}
_AXIS_OF_EXAMPLES = {"batch": 0, "mask": 0, "batches": 1, "rows": 1}


class Leaf(NamedTuple):
    """The properties of one array for which a program is compiled.

    Attributes:
        shape: its shape.
        dtype: its dtype in JAX.
        weak_type: whether it is weakly typed, as Python's numbers are.
        sharding: its sharding; None if it is uncommitted.
    """

    shape: tuple[int, ...]
    dtype: str
    weak_type: bool
    sharding: Any

    def __str__(self) -> str:
        shape = ",".join(map(str, self.shape))
        return f"{self.dtype}[{shape}]{' (weakly typed)' * self.weak_type}"


class Signature(NamedTuple):
    """The properties of arguments for which a program is compiled.

    Attributes:
        leaves: arrays by path, such as `batch/image`.
        structure: tree structure of the arguments, including static fields.
    """

    leaves: dict[str, Leaf]
    structure: Any


class Difference(NamedTuple):
    """The difference between two signatures.

    Attributes:
        leaves: paths of the leaves that differ.
        text: describes the difference.
        remedy: how to avoid it.
        is_resized: whether only the number of examples differs.
        is_reshaped: whether only lengths of axes of batches differ, including axes other than the
            first.
    """

    leaves: tuple[str, ...]
    text: str
    remedy: str
    is_resized: bool
    is_reshaped: bool


def signature(arguments: Mapping[str, Any]) -> Signature:
    """Returns the signature of a call.

    Args:
        arguments: by name; donated arrays are allowed.
    """
    leaves = {
        _leaf_path(name, path): _leaf(value)
        for name, argument in arguments.items()
        for path, value in jax.tree.leaves_with_path(argument)
    }
    return Signature(leaves, jax.tree.structure(tuple(arguments.values())))


def difference(earlier: Iterable[Signature], new: Signature) -> Difference:
    """Compares a signature with the most similar earlier one.

    Args:
        earlier: at least one signature; ties are resolved in favor of the last.
        new: the new signature.
    """
    distances = [_distance(old, new) for old in earlier]
    nearest = min(range(len(distances)), key=lambda index: (distances[index], -index))
    return _between(list(earlier)[nearest], new)


def _distance(old: Signature, new: Signature) -> tuple[int, bool, int]:
    changed = _changed(old, new)
    pairs = [(old.leaves.get(name), new.leaves.get(name)) for name in changed]
    total = sum(_leaf_distance(a, b) for a, b in pairs if a is not None and b is not None)
    return len(changed), old.structure != new.structure, total


def _leaf_distance(old: Leaf, new: Leaf) -> int:
    """Returns the number of axes that differ in length, plus one if dtype or sharding differs."""
    axes = sum(a != b for a, b in zip(old.shape, new.shape, strict=False))
    return axes + (old[1:] != new[1:])


def _between(old: Signature, new: Signature) -> Difference:
    changed = _changed(old, new)
    pairs = {name: (old.leaves.get(name), new.leaves.get(name)) for name in changed}
    is_resized = bool(pairs) and all(_is_resized(name, *pair) for name, pair in pairs.items())
    is_reshaped = bool(pairs) and all(_is_reshaped(name, *pair) for name, pair in pairs.items())
    if changed:
        text = "; ".join(_text(name, *pairs[name]) for name in changed[:_MAX_NAMED])
        text += f"; and {len(changed) - _MAX_NAMED} more" * (len(changed) > _MAX_NAMED)
        remedy = _RESIZED if is_resized else _remedy(changed[0], *pairs[changed[0]])
    elif old.structure != new.structure:
        text, remedy = "all leaves are unchanged, but the tree structure differs", _STRUCTURE
    else:
        text, remedy = "all arguments are the same as in an earlier compile", _UNCHANGED
    return Difference(changed, text, remedy, is_resized, is_reshaped and not is_resized)


_RESIZED = "Drop a short last batch (remainder='drop'), pad it, or bucket batches into a few sizes."
_STRUCTURE = "Keep node types and static fields such as tx the same in every step."
_UNCHANGED = (
    "JAX compiles again after jax.clear_caches() and after most changes of jax.config: make them "
    "before training."
)
_REMEDIES = {
    ("batch", "entry"): "Yield the same entries in every batch.",
    ("batch", "shape"): "Yield batches of one shape: pad them, or bucket them into a few sizes.",
    ("batch", "dtype"): "Cast it in the loader, always to the same dtype.",
    ("state", "entry"): "Return a state with the same entries as the argument of the step.",
    ("state", "shape"): "Return arrays with the same shapes as in the argument of the step.",
    ("state", "dtype"): "Keep its dtype with .astype in the step; Python numbers are weakly typed.",
}
_PLACE = "Place it on one device or sharding with jax.device_put, before the first step."


def _remedy(name: str, old: Leaf | None, new: Leaf | None) -> str:
    part = "state" if name.split("/")[0] in ("state", "table") else "batch"
    if old is None or new is None:
        return _REMEDIES[part, "entry"]
    if old.shape != new.shape:
        return _REMEDIES[part, "shape"]
    if old[:3] != new[:3]:
        return _REMEDIES[part, "dtype"]
    return _PLACE


def _text(name: str, old: Leaf | None, new: Leaf | None) -> str:
    if old is None:
        return f"{name} is new: {new}"
    if new is None:
        return f"{name} is missing: it was {old}"
    if old[:3] == new[:3]:
        was, now = (leaf.sharding or "JAX's default device" for leaf in (old, new))
        return f"{name} was on {was}, is on {now}"
    return f"{name} was {old}, is {new}"


def _changed(old: Signature, new: Signature) -> tuple[str, ...]:
    names = dict.fromkeys([*new.leaves, *old.leaves])
    return tuple(name for name in names if old.leaves.get(name) != new.leaves.get(name))


def _is_resized(name: str, old: Leaf | None, new: Leaf | None) -> bool:
    axis = _AXIS_OF_EXAMPLES.get(name.split("/")[0])
    if axis is None or old is None or new is None or not axis < len(old.shape) == len(new.shape):
        return False
    shape = (*old.shape[:axis], new.shape[axis], *old.shape[axis + 1 :])
    return old._replace(shape=shape) == new


def _is_reshaped(name: str, old: Leaf | None, new: Leaf | None) -> bool:
    if name.split("/")[0] not in _AXIS_OF_EXAMPLES or old is None or new is None:
        return False
    return len(old.shape) == len(new.shape) and old._replace(shape=new.shape) == new


def _leaf_path(name: str, path: tuple[Any, ...]) -> str:
    whole = f"{name}/{leaf_name(path)}" if path else name
    for field, shown in _NAMES.items():
        if whole.startswith(field):
            return shown + whole.removeprefix(field)
    return whole


def _leaf(value: Any) -> Leaf:
    aval: Any = jax.typeof(value)
    is_placed = isinstance(value, jax.Array) and value.committed
    return Leaf(
        tuple(aval.shape),
        str(aval.dtype),
        bool(getattr(aval, "weak_type", False)),
        value.sharding if is_placed else None,
    )

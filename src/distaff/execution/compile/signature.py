"""Signatures: what of its arguments a program is compiled for, and how two of them differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

from distaff.errors import leaf_name

_MAX_NAMED = 4

# Fields of a chunk's source (`distaff.data`), as its reader knows them.
_SAID = {"source/whole": "batch", "source/": ""}
_AXIS_OF_EXAMPLES = {"batch": 0, "mask": 0, "batches": 1, "rows": 1}


class Leaf(NamedTuple):
    """What a program is compiled for, of one array.

    Attributes:
        shape: its shape.
        dtype: the dtype JAX gives it.
        weak_type: whether it takes the dtype of what it meets, as Python's numbers do.
        sharding: where it is; None where JAX may place it.
    """

    shape: tuple[int, ...]
    dtype: str
    weak_type: bool
    sharding: Any

    def __str__(self) -> str:
        shape = ",".join(map(str, self.shape))
        return f"{self.dtype}[{shape}]{' (weakly typed)' * self.weak_type}"


class Signature(NamedTuple):
    """What a program is compiled for.

    Attributes:
        leaves: by path, such as `batch/image`.
        structure: of the arguments, static members included.
    """

    leaves: dict[str, Leaf]
    structure: Any


class Difference(NamedTuple):
    """How a signature differs from another.

    Attributes:
        leaves: paths of the leaves that differ.
        text: what differs.
        remedy: what to do about it.
        is_resized: whether all that differs is the number of examples.
        is_reshaped: whether all that differs are lengths of axes of batches, more than their first.
    """

    leaves: tuple[str, ...]
    text: str
    remedy: str
    is_resized: bool
    is_reshaped: bool


def signature(arguments: Mapping[str, Any]) -> Signature:
    """Returns the signature of a call.

    Args:
        arguments: by name; arrays that were given away still know what they were.
    """
    leaves = {
        _said(name, path): _leaf(value)
        for name, argument in arguments.items()
        for path, value in jax.tree.leaves_with_path(argument)
    }
    return Signature(leaves, jax.tree.structure(tuple(arguments.values())))


def difference(earlier: Iterable[Signature], new: Signature) -> Difference:
    """Compares a signature with the nearest of earlier ones.

    Args:
        earlier: at least one; of equally near ones the last counts.
        new: what is there now.
    """
    distances = [_distance(old, new) for old in earlier]
    nearest = min(range(len(distances)), key=lambda index: (distances[index], -index))
    return _between(list(earlier)[nearest], new)


def _distance(old: Signature, new: Signature) -> tuple[int, bool, int]:
    """Returns how many leaves differ, whether the structure does, and in how much the leaves do."""
    changed = _changed(old, new)
    pairs = [(old.leaves.get(name), new.leaves.get(name)) for name in changed]
    facts = sum(_num_facts(a, b) for a, b in pairs if a is not None and b is not None)
    return len(changed), old.structure != new.structure, facts


def _num_facts(old: Leaf, new: Leaf) -> int:
    """Returns how many lengths of axes differ, and dtype and place as one more."""
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
        text, remedy = "all leaves are as they were, the tree around them is not", _STRUCTURE
    else:
        text, remedy = "all arguments are as they were for an earlier compile", _UNCHANGED
    return Difference(changed, text, remedy, is_resized, is_reshaped and not is_resized)


_RESIZED = "Drop a short last batch (remainder='drop'), pad it, or sort batches into a few sizes."
_STRUCTURE = "Keep the type of each node, and static members such as tx, from step to step."
_UNCHANGED = (
    "JAX compiles again after jax.clear_caches() and after most changes of jax.config: make them "
    "before training."
)
_REMEDIES = {
    ("batch", "entry"): "Yield the same entries in every batch.",
    ("batch", "shape"): "Yield batches of one shape: pad them, or sort them into a few sizes.",
    ("batch", "dtype"): "Cast it in the loader, always to the same dtype.",
    ("state", "entry"): "Return a state of the form that the step was given.",
    ("state", "shape"): "Return arrays of the shapes that the step was given.",
    (
        "state",
        "dtype",
    ): "Keep its dtype in the step with .astype; Python's numbers are weakly typed.",
}
_PLACE = "Place it in one way throughout, with jax.device_put, before the first step."


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
        return f"{name} is gone: it was {old}"
    if old[:3] == new[:3]:
        was, now = (leaf.sharding or "wherever JAX places it" for leaf in (old, new))
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


def _said(name: str, path: tuple[Any, ...]) -> str:
    whole = f"{name}/{leaf_name(path)}" if path else name
    for field, said in _SAID.items():
        if whole.startswith(field):
            return said + whole.removeprefix(field)
    return whole


def _leaf(value: Any) -> Leaf:
    kind: Any = jax.typeof(value)
    is_placed = isinstance(value, jax.Array) and value.committed
    return Leaf(
        tuple(kind.shape),
        str(kind.dtype),
        bool(getattr(kind, "weak_type", False)),
        value.sharding if is_placed else None,
    )

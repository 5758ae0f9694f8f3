"""NNX modules in a pass: mode, sown values, and side effects."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
from flax import nnx

from distaff.core.warnings import warn
from distaff.errors import ModeWarning
from distaff.models.adapter import nested
from distaff.models.flags import switched
from distaff.models.linen_collections import matches
from distaff.models.observed import Observed
from distaff.models.randomness import no_key


def without_sown(module: nnx.Module) -> nnx.Module:
    """Returns a module without values sown by earlier calls; itself if there are none."""

    def is_sown(path: Any, leaf: Any) -> bool:
        is_variable = isinstance(leaf, nnx.Variable)
        return is_variable and (
            isinstance(leaf, nnx.Intermediate) or isinstance(leaf.get_value(), tuple)
        )

    if not any(is_sown(path, leaf) for path, leaf in nnx.to_flat_state(nnx.split(module)[1])):
        return module
    module = nnx.clone(module)
    nnx.pop(module, is_sown)
    return module


def set_mode(module: nnx.Module, train: bool) -> nnx.Module:
    """Sets the mode of a module and its submodules, in place if possible, and returns it."""
    module = nnx.view(
        module, raise_if_not_found=False, deterministic=not train, use_running_average=not train
    )
    for _, node in nnx.iter_modules(module):
        for name, value in list(vars(node).items()):
            new = switched(name, value, train)
            if new is not value:
                setattr(node, name, new)
    return module


def sown_values(state: Any, known: Collection[Any], requested: Any) -> dict[str, Any]:
    """Returns the values that a pass has added to a module, by collection and path, nested.

    Args:
        state: state of the module after the pass.
        known: paths of its variables before the pass.
        requested: collections to return, named like the classes of their variables.
    """
    leaves = [
        (type(leaf).__name__, tuple(map(str, path)), leaf.get_value())
        for path, leaf in nnx.to_flat_state(state)
        if path not in known and isinstance(leaf, nnx.Variable)
    ]
    collections = nested(leaf for leaf in leaves if matches(requested, leaf[0])).by_collection()
    return {name: tree for name, tree in collections.items() if tree}


class Snapshot(NamedTuple):
    """Python numbers and random streams of a module before a pass.

    Attributes:
        numbers: numeric attributes by module and name.
        counts: draws from each random stream.
        dropout: draws of each dropout layer.
        statistics: mean of each layer with running statistics.
    """

    numbers: dict[tuple[str, str], int | float]
    counts: dict[str, Any]
    dropout: dict[str, Any]
    statistics: dict[str, Any]

    @classmethod
    def of(cls, module: nnx.Module) -> Snapshot:
        """Returns a snapshot of a module."""
        numbers: dict[tuple[str, str], int | float] = {}
        counts, dropout, statistics = {}, {}, {}
        for path, node in nnx.iter_modules(module):
            name = "/".join(map(str, path))
            for attribute, value in vars(node).items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    numbers[name, attribute] = value
            if isinstance(node, nnx.Dropout) and node.rate > 0 and node.rngs is not None:
                dropout[name] = _leaf(node.rngs)
            if isinstance(node, nnx.BatchNorm):
                statistics[name] = node.mean.get_value()
        for path, leaf in nnx.to_flat_state(nnx.split(module, nnx.RngCount, ...)[1]):
            counts["/".join(map(str, path))] = leaf.get_value()
        return cls(numbers, counts, dropout, statistics)

    def check(self, module: nnx.Module, *, must_not_draw: bool, observed: Observed | None) -> None:
        """Warns of changes that are lost after the pass, and records the mode of layers.

        Raises:
            NoKeyError: the module has drawn random numbers although it must not.
        """
        now, name = Snapshot.of(module), type(module).__name__
        if must_not_draw and any(now.counts.get(n) is not x for n, x in self.counts.items()):
            raise no_key(name)
        for (path, attribute), value in now.numbers.items():
            if self.numbers.get((path, attribute), value) != value:
                where = f"{path}.{attribute}" if path else attribute
                warn(
                    f"The pass changes {where!r} of {name}, a Python number, which is a constant "
                    "of the program: each pass starts with the same value. Use a variable: "
                    "self.count = nnx.Variable(jnp.zeros((), jnp.int32)), and "
                    "self.count[...] += 1.",
                    ModeWarning,
                    stacklevel=2,
                )
        if observed is None or not observed.train:
            return
        for path, before in self.dropout.items():
            observed.dropout(path, is_on=now.dropout.get(path) is not before)
        for path, before in self.statistics.items():
            observed.statistics(path, is_on=now.statistics.get(path) is not before)


def _leaf(rngs: Any) -> Any:
    """Returns the count of a stream, or of the first of several."""
    return next(iter(jax.tree.leaves(nnx.state(rngs, nnx.RngCount))), None)

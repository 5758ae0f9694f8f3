"""A model whose activations stay split by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from distaff.core.rewriter import Rule, Sources, bound
from distaff.core.typing import Key, PyTree
from distaff.mesh.config import BATCH_AXES
from distaff.models.adapter import Model, ModelWrapper, Variables, accepts_collections
from distaff.models.observed import Observed, observing
from distaff.models.precision.rewritten import rewritten

_PINNED = (
    *("dot_general", "conv_general_dilated", "add", "add_any", "sub", "mul", "div", "max"),
    *("reshape", "transpose", "gather", "concatenate", "broadcast_in_dim", "select_n"),
    *("convert_element_type", "reduce_sum", "reduce_max", "exp", "tanh", "logistic"),
)
"""The operations whose results are pinned."""


class PinnedModel(ModelWrapper):
    """Keeps the activations of a model split by batch. No value changes.

    The shardings of parameters alone let XLA gather whole activations on every device.

    Args:
        inner: the model.
        mesh: the devices, with the axes `data` and `fsdp`.

    Attributes:
        plain: the model without pinned activations.
    """

    def __init__(self, inner: Model, mesh: jax.sharding.Mesh) -> None:
        super().__init__(inner)
        self.plain = inner
        self._mesh = mesh

    def observing(self, observed: Observed) -> PinnedModel:
        """Returns this model with its passes recorded."""
        return PinnedModel(observing(self.inner, observed), self._mesh)

    @accepts_collections
    def apply(
        self, variables: Variables, *inputs: Any, train: bool, key: Key | None, **kwargs: Any
    ) -> tuple[Any, Variables]:
        """Runs the forward pass; see `Model.apply`."""

        def run(variables: Variables) -> tuple[Any, Variables]:
            return self.inner.apply(variables, *inputs, train=train, key=key, **kwargs)

        return self._run(run, variables, inputs)

    def forward(self, variables: Mapping[str, PyTree], *inputs: Any, **kwargs: Any) -> Any:
        """Runs the model's own forward function, given collections by name."""

        def run(variables: Mapping[str, PyTree]) -> Any:
            return self.inner.apply_fn(variables, *inputs, **kwargs)

        return self._run(run, variables, inputs)

    def _run(self, function: Callable[[Any], Any], variables: Any, inputs: tuple[Any, ...]) -> Any:
        size = next((np.shape(x)[0] for x in jax.tree.leaves(inputs) if np.ndim(x)), 0)
        if not size or size % (self._mesh.shape["data"] * self._mesh.shape["fsdp"]):
            return function(variables)
        rules = {**dict.fromkeys(_PINNED, _pin(self._mesh, size)), "shard_map": _unchanged}
        return rewritten(function, variables, rules, "mesh", type(self.module).__name__)


def _pin(mesh: jax.sharding.Mesh, size: int) -> Rule:
    """Returns a rule that splits results by their first axis, if it is that of the batch."""

    def pin(equation: Any, operands: list[Any], sources: list[Sources]) -> list[Any]:
        results = bound(equation, operands)
        # Arrays computed from named ones only, such as transposed kernels, have no batch axis.
        is_activation = any(each is None for each in sources)
        return [_split(x, mesh) if is_activation and x.shape[:1] == (size,) else x for x in results]

    return pin


def _unchanged(equation: Any, operands: list[Any], sources: list[Sources]) -> Sequence[Any]:
    """A rule for `jax.shard_map`, which says itself how its arrays are split."""
    return bound(equation, operands)


def _split(x: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
    rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh, PartitionSpec(BATCH_AXES, *rest))
    )

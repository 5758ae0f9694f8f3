"""A model whose forward pass computes in another precision."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp

from distaff.core.equations import named_scope
from distaff.core.typing import Key, PyTree
from distaff.errors import leaf_name
from distaff.models.adapter import Model, ModelWrapper, Variables, accepts_collections
from distaff.models.observed import Observed, observing
from distaff.models.precision.autocast import autocast
from distaff.models.precision.options import PrecisionConfig, PrecisionName, precision_of
from distaff.models.precision.rewritten import rewritten

SCALED = "scaled"
"""The scope of the products with a loss scale; see `named_scope`."""


class InPrecision(ModelWrapper):
    """Runs the passes of a model in a precision. The model itself is not changed.

    Args:
        inner: the model.
        precision: the precision of its passes.
        scale: factor of the cotangents inside a pass, float32 `[]`; None for 1. Gradients come out
            without it.
        on_mesh: whether devices add up the gradients of parameters, in `gradient_sums` of the
            precision.
    """

    def __init__(
        self,
        inner: Model,
        precision: PrecisionConfig,
        scale: jax.Array | None = None,
        *,
        on_mesh: bool = False,
    ) -> None:
        super().__init__(inner)
        self._precision, self._scale, self._on_mesh = precision, scale, on_mesh

    def observing(self, observed: Observed) -> InPrecision:
        """Returns this model with its passes recorded."""
        return self.around(observing(self.inner, observed))

    def around(self, inner: Model) -> InPrecision:
        """Returns another model in this precision."""
        return InPrecision(inner, self._precision, self._scale, on_mesh=self._on_mesh)

    def scaled(self, scale: jax.Array | None) -> InPrecision:
        """Returns this model with cotangents multiplied by a scale inside its passes."""
        return InPrecision(self.inner, self._precision, scale, on_mesh=self._on_mesh)

    @accepts_collections
    def apply(
        self, variables: Variables, *inputs: Any, train: bool, key: Key | None, **kwargs: Any
    ) -> tuple[Any, Variables]:
        """Runs the forward pass; see `Model.apply`.

        Raises:
            ConfigError: the model returns something else than a pytree of arrays.
        """
        params = self._in_float32(variables.params)
        if self._scale is not None:
            params, inputs, kwargs = scaled((params, inputs, kwargs), 1 / self._scale)

        def run(variables: Variables) -> tuple[Any, Variables]:
            return self.inner.apply(variables, *inputs, train=train, key=key, **kwargs)

        outputs, after = self._run(run, variables._replace(params=params))
        if self._scale is not None:
            outputs = scaled(outputs, self._scale)
        return outputs, after._replace(params=variables.params)

    def forward(self, variables: Mapping[str, PyTree], *inputs: Any, **kwargs: Any) -> Any:
        """Runs the model's own forward function, given collections by name."""
        variables = {**variables, "params": self._in_float32(variables["params"])}
        return self._run(lambda held: self.inner.apply_fn(held, *inputs, **kwargs), variables)

    def _run(self, function: Callable[[Any], Any], variables: Any) -> Any:
        if self._precision.compute is None:
            with self._setting():
                return function(variables)
        rules = autocast(
            self._precision.compute,
            float32=self._precision.float32,
            wide_gradients=self._on_mesh and self._precision.gradient_sums == "float32",
        )

        def traced(variables: Any) -> Any:
            with self._setting():
                return function(variables)

        return rewritten(traced, variables, rules, "precision", type(self.module).__name__)

    def _in_float32(self, params: PyTree) -> PyTree:
        """Returns parameters as a model without this precision has them."""
        # Otherwise its softmax and norms would be in the dtype in which parameters are stored.
        return params if self._precision.params is None else jax.tree.map(_widened, params)

    def _setting(self) -> Any:
        setting = self._precision.matmul_precision
        return nullcontext() if setting is None else jax.default_matmul_precision(setting)


def stored(params: PyTree, precision: PrecisionName | PrecisionConfig) -> PyTree:
    """Returns parameters in the dtype in which a precision stores them."""
    dtype, kept = precision_of(precision).params, precision_of(precision).float32
    if dtype is None:
        return params

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        is_kept = any(fnmatch.fnmatchcase(leaf_name(path), pattern) for pattern in kept)
        return leaf if is_kept or leaf.dtype != jnp.float32 else leaf.astype(dtype)

    return jax.tree.map_with_path(one, params)


def with_scale(model: Model, scale: jax.Array | None) -> Model:
    """Returns a model whose passes use a loss scale, if it computes in another precision."""
    return model.scaled(scale) if isinstance(model, InPrecision) and scale is not None else model


def scaled(tree: PyTree, factor: jax.Array) -> PyTree:
    """Returns the float arrays of a tree unchanged, with derivatives multiplied by a factor."""

    def one(leaf: Any) -> Any:
        is_float = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact)
        return _scaled(leaf, factor) if is_float else leaf

    return jax.tree.map(one, tree)


@jax.custom_jvp
def _scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    return x


@_scaled.defjvp
def _(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    (x, factor), tangent = primals, tangents[0]
    with named_scope(SCALED):
        # In float32, since a scale of 2**24 is infinite in float16.
        wide = jnp.promote_types(tangent.dtype, jnp.float32)
        return x, (tangent.astype(wide) * factor).astype(tangent.dtype)


def _widened(leaf: Any) -> Any:
    is_half = isinstance(leaf, jax.Array) and leaf.dtype == jnp.bfloat16
    return leaf.astype(jnp.float32) if is_half else leaf

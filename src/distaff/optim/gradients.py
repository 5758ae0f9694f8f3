"""Checks of parameters and gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from distaff.core.typing import Params, PyTree
from distaff.errors import StateError, leaf_name


def check_trainable(params: Params) -> None:
    """Checks that JAX can differentiate by each parameter: that its dtype is float or complex.

    Raises:
        StateError: a parameter has another dtype.
    """
    for path, leaf in jax.tree.leaves_with_path(params):
        dtype = jax.dtypes.result_type(leaf) if not hasattr(leaf, "dtype") else leaf.dtype
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise StateError(
                f"The parameter {leaf_name(path)!r} has dtype {dtype}, which JAX cannot "
                "differentiate. To train it, use a float or complex dtype. Otherwise keep it out "
                "of the parameters: as a constant or plain attribute of the model, or as a "
                "variable of another collection (in Flax Linen self.variable('constants', ...))."
            )


def check_params(params: Params) -> None:
    """Checks that parameters are not the pair that an optimizer's `update` returns.

    Raises:
        StateError: they hold the state of an optimizer.
    """

    def is_optax_state(node: Any) -> bool:
        if isinstance(node, optax.LookaheadParams):
            return False
        return type(node).__module__.partition(".")[0] == "optax"

    if any(is_optax_state(node) for node in jax.tree.leaves(params, is_leaf=is_optax_state)):
        raise StateError(
            "params holds the state of an optimizer, which optimizer.update also returns. Write "
            "updates, opt_state = optimizer.update(grads, opt_state, params), then "
            "params = optax.apply_updates(params, updates); or state.apply_gradients(grads=grads), "
            "which does both."
        )


def descending(grads: Params) -> Params:
    """Returns gradients whose negative is the direction of steepest descent.

    JAX returns the conjugate for a complex parameter; see `jax.grad`.
    """
    return jax.tree.map(lambda leaf: jnp.conj(leaf) if jnp.iscomplexobj(leaf) else leaf, grads)


def is_complex(tree: PyTree) -> bool:
    """Returns whether an array of a tree is complex."""
    return any(map(jnp.iscomplexobj, jax.tree.leaves(tree)))


def num_per_example(grads: Params, params: Params) -> int | None:
    """Returns the number of examples of gradients with a leading axis of examples.

    Args:
        grads: leaves `[examples, *shape]`, or any others.
        params: leaves `shape`.

    Returns:
        None if they have no such axis.
    """
    if jax.tree.structure(grads) != jax.tree.structure(params):
        return None
    pairs = list(zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True))
    sizes = {jnp.shape(grad)[:1] for grad, _ in pairs}
    has_axis = all(jnp.shape(grad)[1:] == jnp.shape(param) for grad, param in pairs)
    is_other = all(jnp.ndim(grad) == jnp.ndim(param) + 1 for grad, param in pairs)
    return next(iter(sizes))[0] if has_axis and is_other and len(sizes) == 1 else None


def check_gradients(grads: Params, params: Params) -> None:
    """Checks that gradients, or updates, have the structure and shapes of parameters.

    Raises:
        StateError: they do not; the message names the leaves that differ.
    """
    got, expected = _shapes(grads), _shapes(params)
    structures = [jax.tree.structure(tree) for tree in (grads, params)]
    if got == expected and structures[0] == structures[1]:
        return
    leaves = "; ".join(
        f"{n!r} is {got.get(n, 'missing')} in grads, {expected.get(n, 'missing')} in params"
        for n in {**expected, **got}
        if got.get(n) != expected.get(n)
    )
    raise StateError(
        "grads must have the structure and the shapes of params. "
        f"{leaves or ' is not '.join(map(str, structures))}. "
        "Differentiate the loss with respect to state.params."
    )


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    return {leaf_name(path): jnp.shape(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}

"""Gradients: what an optimizer can train, and the form of the gradients that it is given."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from distaff.core.typing import Params, PyTree
from distaff.errors import StateError, leaf_name


def check_trainable(params: Params) -> None:
    """Checks that each parameter is a float or complex array, which JAX can differentiate.

    Args:
        params: what an optimizer is to train; arrays, or their shapes.

    Raises:
        StateError: one is not; it is named.
    """
    for path, leaf in jax.tree.leaves_with_path(params):
        dtype = jax.dtypes.result_type(leaf) if not hasattr(leaf, "dtype") else leaf.dtype
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise StateError(
                "A parameter is an array of float or complex numbers, which a loss can be "
                f"differentiated by; {leaf_name(path)!r} has dtype {dtype}. Keep it out of the "
                "parameters: as a constant or a plain attribute of the model, or as a variable "
                "of another collection (in Flax Linen self.variable('constants', ...)). A number "
                "that is to be trained needs a float dtype."
            )


def check_params(params: Params) -> None:
    """Checks that parameters are not what an optimizer's `update` returned.

    Raises:
        StateError: they hold the state of an optimizer.
    """

    def is_optax_state(node: Any) -> bool:
        if isinstance(node, optax.LookaheadParams):
            return False
        return type(node).__module__.partition(".")[0] == "optax"

    if any(is_optax_state(node) for node in jax.tree.leaves(params, is_leaf=is_optax_state)):
        raise StateError(
            "params holds the state of an optimizer, as optimizer.update returns it. Write "
            "updates, opt_state = optimizer.update(grads, opt_state, params), then "
            "params = optax.apply_updates(params, updates); or state.apply_gradients(grads=grads), "
            "which does both."
        )


def descending(grads: Params) -> Params:
    """Returns gradients whose negative is the direction of steepest descent.

    For a complex parameter JAX's gradient is the conjugate of that; see `jax.grad`.
    """
    return jax.tree.map(lambda leaf: jnp.conj(leaf) if jnp.iscomplexobj(leaf) else leaf, grads)


def is_complex(tree: PyTree) -> bool:
    """Returns whether an array of a tree is complex."""
    return any(map(jnp.iscomplexobj, jax.tree.leaves(tree)))


def num_per_example(grads: Params, params: Params) -> int | None:
    """Returns of how many examples gradients are, if they have one more axis, in front.

    Args:
        grads: each leaf `[examples, *shape]`, or any others.
        params: each leaf `shape`.

    Returns:
        None for gradients of another form.
    """
    if jax.tree.structure(grads) != jax.tree.structure(params):
        return None
    pairs = list(zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True))
    sizes = {jnp.shape(grad)[:1] for grad, _ in pairs}
    has_axis = all(jnp.shape(grad)[1:] == jnp.shape(param) for grad, param in pairs)
    is_other = all(jnp.ndim(grad) == jnp.ndim(param) + 1 for grad, param in pairs)
    return next(iter(sizes))[0] if has_axis and is_other and len(sizes) == 1 else None


def check_gradients(grads: Params, params: Params) -> None:
    """Checks that gradients, or updates, have the structure and the shapes of parameters.

    Raises:
        StateError: they do not; the leaves that differ are named.
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

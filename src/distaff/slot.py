"""The optimizer slot: what a step offers to its optimizer beside the gradient, and who takes it."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distaff.errors import StateError
from distaff.typing import Params, PyTree

_REFUSED = re.compile(r"unexpected keyword argument '(\w+)'")
_ASKED = re.compile(r"missing \d+ required keyword-only argument|must be provided")


def with_known_args(
    tx: optax.GradientTransformation | optax.MultiSteps,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that, of all arguments offered to its `update`, it gets those it takes.

    An `update` with `**extra_args` gets all of them, any other those that it names. Optax's
    `with_extra_args_support` goes by the type instead: with it `optax.contrib.sam` fails on what it
    does not name, and `optax.MultiSteps(...).gradient_transformation()` loses what it would take.

    Args:
        tx: any Optax optimizer. Where its `update` names `grad_fn`, and only `value_fn` is offered,
            it gets the gradient of that: `grad_fn(params, step)`, as SAM calls it.

    Returns:
        An optimizer of the same states and updates.
    """
    if isinstance(tx, optax.MultiSteps):
        tx = tx.gradient_transformation()
    parameters = inspect.signature(tx.update).parameters
    named = list(parameters)[3:]  # after updates, state and params
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    if takes_all and "grad_fn" not in named:
        is_ready = isinstance(tx, optax.GradientTransformationExtraArgs)
        return tx if is_ready else optax.GradientTransformationExtraArgs(tx.init, tx.update)

    def update(
        updates: PyTree, state: PyTree, params: Params | None = None, **offered: Any
    ) -> tuple[PyTree, PyTree]:
        if "grad_fn" in named and "value_fn" in offered:
            gradient = jax.grad(offered["value_fn"])
            offered = {"grad_fn": lambda params, _: gradient(params), **offered}
        known = {name: arg for name, arg in offered.items() if takes_all or name in named}
        return tx.update(updates, state, params, **known)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def update(
    tx: optax.GradientTransformation,
    grads: Params,
    opt_state: PyTree,
    params: Params,
    offered: Mapping[str, Any],
) -> tuple[Params, PyTree]:
    """Returns the updates and the new state of any optimizer.

    Args:
        tx: the optimizer.
        grads: gradient of the loss.
        opt_state: its state.
        params: the parameters.
        offered: further arguments by name; what is None is left out. A `value_fn` may then be
            asked about parameters of which `optax.masked` shows only some: the others are held.

    Raises:
        StateError: the optimizer needs an argument that is not there, or one inside of it does not
            take one that is.
    """
    given = {name: arg for name, arg in offered.items() if arg is not None}
    if "value_fn" in given:
        given["value_fn"] = _of_shown(given["value_fn"], params)
    try:
        return with_known_args(tx).update(grads, opt_state, params, grad=grads, **given)
    except (TypeError, ValueError) as error:
        refused = _REFUSED.search(str(error))
        if refused is not None and refused[1] in {"grad", *given}:
            raise StateError(
                "optax.chain, partition and the like hand all that a step offers to each of their "
                f"optimizers, and one of these does not take {refused[1]!r} ({error}). Put it "
                "outermost, or wrap it: distaff.optim.with_known_args(optimizer)."
            ) from error
        if _ASKED.search(str(error)):
            raise StateError(
                f"The optimizer asks for more than {', '.join(['grad', *given])}, which it was "
                f"offered ({error}). Call state.apply_gradients(grads=grads, value=loss, "
                "value_fn=lambda params: ...), with any other argument in optimizer_args."
            ) from error
        raise


def is_masked(node: Any) -> bool:
    """Tells whether a node of a pytree stands for parameters that a mask hides."""
    return isinstance(node, optax.MaskedNode)


def filled(shown: PyTree, params: Params) -> Params:
    """Returns a pytree with what a mask hides of it taken from `params`."""
    return jax.tree.map(
        lambda own, full: full if is_masked(own) else own, shown, params, is_leaf=is_masked
    )


def _of_shown(value_fn: Callable[..., jax.Array], params: Params) -> Callable[..., jax.Array]:
    """Returns `value_fn` as a function of parameters some of which are masked, and then held."""

    @functools.wraps(value_fn)  # A line search reads its signature.
    def of_shown(shown: Params, *args: Any, **kwargs: Any) -> jax.Array:
        # A copy is not taken for the state's own parameters, and costs nothing in a program.
        whole = jax.tree.map(jnp.copy, filled(shown, params))
        return value_fn(whole, *args, **kwargs)

    return of_shown

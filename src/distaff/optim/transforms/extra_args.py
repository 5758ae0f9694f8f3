"""The optimizer slot: what a step offers to its optimizer beside the gradient, and who takes it."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from distaff.core.typing import Params, PyTree
from distaff.errors import StateError, leaf_name
from distaff.optim.gradients import check_gradients, descending, is_complex, num_per_example

_REFUSED = re.compile(r"unexpected keyword argument '(\w+)'")
_ASKED = re.compile(r"missing \d+ required keyword-only argument|must be provided")


FLUSH = "flush"
"""What asks an optimizer that accumulates for an update before its window is full.

`"end"` offers no gradient, and asks for an update of those that it has; `"now"` for one with this
gradient.
"""


class AccumulateState(NamedTuple):
    """The state of an optimizer that accumulates; see `distaff.optim.transforms.accumulate`.

    Attributes:
        count: micro-steps since the last update, int32 `[]`.
        grads: the weighted sum of their gradients, in float32 or wider.
        value: the weighted sum of their losses, float32 `[]`; 0 where none are given.
        weight: the sum of their weights, float32 `[]`.
        num_updates: updates so far, int32 `[]`.
        inner: the state of the optimizer itself.
    """

    count: jax.Array
    grads: Params
    value: jax.Array
    weight: jax.Array
    num_updates: jax.Array
    inner: PyTree


class Described(optax.GradientTransformationExtraArgs):
    """An optimizer that says more of itself than Optax asks for.

    Attributes:
        rates: from parameters to learning rates by update, by the name they are logged under.
        keeps: whether the running statistics at a path stay as they are.
    """

    rates: Callable[[Params], Mapping[str, Callable[[Any], Any]]] | None = None
    keeps: Callable[[str], bool] | None = None


def described(tx: optax.GradientTransformationExtraArgs, like: Any = None, **facts: Any) -> Any:
    """Returns an optimizer with a description.

    Args:
        tx: the optimizer.
        like: one whose description it takes over, if it has any.
        **facts: attributes of `Described`.
    """
    made = Described(tx.init, tx.update)
    facts = {"rates": getattr(like, "rates", None), "keeps": getattr(like, "keeps", None), **facts}
    for name, value in facts.items():
        setattr(made, name, value)
    return made


def found(opt_state: PyTree, *kinds: type) -> Iterator[Any]:
    """Yields the states of some kinds in an optimizer's state, the outermost of each branch."""

    def is_found(node: Any) -> bool:
        return isinstance(node, kinds)

    return filter(is_found, jax.tree.leaves(opt_state, is_leaf=is_found))


def holds(opt_state: PyTree, *kinds: type) -> bool:
    """Returns whether an optimizer's state has one of these kinds in it."""
    return next(found(opt_state, *kinds), None) is not None


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
            offered = {"grad_fn": lambda params, _: descending(gradient(params)), **offered}
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
        if holds(opt_state, optax.contrib.HutchinsonState, optax.contrib.SophiaState):
            given.setdefault("obj_fn", given["value_fn"])
    if holds(opt_state, optax.ScaleByBacktrackingLinesearchState) and is_complex(grads):
        raise StateError(
            "optax.scale_by_backtracking_linesearch does not search along complex parameters: it "
            "takes the slope for another one. Use optax.scale_by_zoom_linesearch or optax.lbfgs."
        )
    try:
        updates, new_state = with_known_args(tx).update(
            grads, opt_state, params, grad=grads, **given
        )
        return updates, _with_still_averages(opt_state, new_state, updates)
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


def prepared(grads: Params, opt_state: PyTree, whole: Params) -> Params:
    """Returns gradients as an optimizer takes them: checked, and pointing uphill.

    Their shapes are those of the parameters, or have one more axis, of examples, in front.

    Args:
        grads: gradients, as `jax.grad` returns them.
        opt_state: the state of the optimizer that is to take them.
        whole: the parameters.

    Raises:
        StateError: they have other shapes, or an optimizer that needs the gradient of each example
            is given their mean.
    """
    if holds(opt_state, optax.LookaheadState) and not isinstance(whole, optax.LookaheadParams):
        raise StateError(
            "optax.lookahead trains optax.LookaheadParams, and the parameters are of type "
            f"{type(whole).__name__}. Make the state with "
            "params=optax.LookaheadParams.init_synced(params), differentiate the loss with respect "
            "to state.params.fast, and evaluate with state.params.slow."
        )
    params = whole
    if isinstance(whole, optax.LookaheadParams):
        params, grads = whole.fast, getattr(grads, "fast", grads)
    is_private = holds(opt_state, optax.contrib.DifferentiallyPrivateAggregateState)
    if num_per_example(grads, params) is not None:
        return descending(grads)
    check_gradients(grads, params)
    if is_private:
        raise StateError(
            "optax.contrib.dpsgd clips the gradient of each example and adds noise to their mean, "
            "so it needs gradients [examples, *shape]; it was given the mean gradient of a batch, "
            "for which its noise protects nobody. Override create_functions with a train_step "
            "that computes jax.vmap(jax.grad(loss), (None, 0))(state.params, batch), and returns "
            "state.apply_gradients(grads=...)."
        )
    return descending(grads)


def kept_statistics(tx: Any, before: PyTree, after: PyTree) -> PyTree:
    """Returns running statistics after a step, those of frozen parts as they were before it."""
    keeps = getattr(tx, "keeps", None)
    if keeps is None or jax.tree.structure(before) != jax.tree.structure(after):
        return after
    return jax.tree_util.tree_map_with_path(
        lambda path, old, new: old if keeps(leaf_name(path)) else new, before, after
    )


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


def _with_still_averages(before: PyTree, after: PyTree, updates: Params) -> PyTree:
    """Returns an optimizer's state in which averages of frozen parameters stand still, too.

    `optax.contrib.schedule_free` moves the point that it averages, whatever a transformation behind
    it, such as `optax.freeze`, then leaves of the update; a model is evaluated with the average.
    """
    kind = optax.contrib.ScheduleFreeState

    def is_average(node: Any) -> bool:
        return isinstance(node, kind)

    def still(old: Any, new: Any) -> Any:
        if not is_average(new) or not _is_of(new.z, updates):
            return new
        moved = jax.tree.map(
            lambda z, z_before, update: z if is_masked(z) else _if_any(update, z, z_before),
            *(new.z, old.z, updates),
            is_leaf=is_masked,
        )
        return new._replace(z=moved)

    if not holds(after, kind):
        return after
    return jax.tree.map(still, before, after, is_leaf=is_average)


def _is_of(shown: PyTree, params: Params) -> bool:
    """Returns whether a tree has the structure of parameters, but for masked ones."""
    try:
        jax.tree.map(lambda *_: None, shown, params, is_leaf=is_masked)
    except (TypeError, ValueError):
        return False
    return True


def _if_any(update: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where((update != 0).any(), new, old)

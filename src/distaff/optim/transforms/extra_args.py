"""Extra arguments of optimizers: passes to each `update` only those that it accepts."""

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

_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")
_MISSING = re.compile(r"missing \d+ required keyword-only argument|must be provided")

_FACTS = ("rates", "keeps", "plateau")

FLUSH = "flush"
"""The argument that requests an update from an optimizer that accumulates, before a window is full.

`"end"` requests one from the gradients accumulated so far, `"now"` one including this gradient.
"""


class AccumulateState(NamedTuple):
    """The state of an optimizer that accumulates; see `distaff.optim.transforms.accumulate`.

    Attributes:
        count: micro-steps since the last update, int32 `[]`.
        grads: weighted sum of their gradients, in float32 or wider.
        value: weighted sum of their losses, float32 `[]`; 0 if none are passed.
        weight: sum of their weights, float32 `[]`.
        num_updates: number of updates, int32 `[]`.
        inner: the state of the optimizer itself.
    """

    count: jax.Array
    grads: Params
    value: jax.Array
    weight: jax.Array
    num_updates: jax.Array
    inner: PyTree


class Described(optax.GradientTransformationExtraArgs):
    """An optimizer with facts that Optax has no field for.

    Attributes:
        rates: a function from parameters to learning rates by update, by their name in the log.
        keeps: whether the running statistics at a path stay unchanged.
        plateau: the rule that a run applies to the optimizer's state after each validation.
    """

    rates: Callable[[Params], Mapping[str, Callable[[Any], Any]]] | None = None
    keeps: Callable[[str], bool] | None = None
    plateau: Any = None


def with_description(
    tx: optax.GradientTransformationExtraArgs, like: Any = None, **facts: Any
) -> Any:
    """Returns an optimizer with facts, attributes of `Described`, by default those from `like`."""
    described = Described(tx.init, tx.update)
    facts = {**{name: getattr(like, name, None) for name in _FACTS}, **facts}
    for name, value in facts.items():
        setattr(described, name, value)
    return described


def find_states(opt_state: PyTree, *types: type) -> Iterator[Any]:
    """Yields the outermost states of the given types in an optimizer's state."""

    def is_match(node: Any) -> bool:
        return isinstance(node, types)

    return filter(is_match, jax.tree.leaves(opt_state, is_leaf=is_match))


def contains(opt_state: PyTree, *types: type) -> bool:
    """Returns whether an optimizer's state contains a state of one of the given types."""
    return next(find_states(opt_state, *types), None) is not None


def with_known_args(
    tx: optax.GradientTransformation | optax.MultiSteps,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that its `update` gets only those extra arguments that it accepts.

    An `update` with `**extra_args` gets all of them, any other those that it names. Optax's
    `with_extra_args_support` decides by type instead: `optax.contrib.sam` then fails on arguments
    it does not name, and `optax.MultiSteps(...).gradient_transformation()` loses arguments it
    accepts.

    Args:
        tx: any Optax optimizer. If its `update` names `grad_fn`, and only `value_fn` is passed, it
            gets the gradient of that: `grad_fn(params, step)`, as SAM calls it.

    Returns:
        An optimizer with the same states and updates.
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
        opt_state: state of the optimizer.
        params: the parameters.
        offered: extra arguments by name; None to leave one out. Under `optax.masked`, a `value_fn`
            may be called with a part of the parameters, and holds the others fixed.

    Raises:
        StateError: the optimizer needs an argument that is missing, or an inner one rejects an
            argument.
    """
    given = {name: arg for name, arg in offered.items() if arg is not None}
    if "value_fn" in given:
        given["value_fn"] = _accepting_masked(given["value_fn"], params)
        if contains(opt_state, optax.contrib.HutchinsonState, optax.contrib.SophiaState):
            given.setdefault("obj_fn", given["value_fn"])
    if contains(opt_state, optax.ScaleByBacktrackingLinesearchState) and is_complex(grads):
        raise StateError(
            "optax.scale_by_backtracking_linesearch does not support complex parameters: it "
            "computes a wrong slope. Use optax.scale_by_zoom_linesearch or optax.lbfgs."
        )
    try:
        updates, new_state = with_known_args(tx).update(
            grads, opt_state, params, grad=grads, **given
        )
        return updates, _with_frozen_averages(opt_state, new_state, updates)
    except (TypeError, ValueError) as error:
        unexpected = _UNEXPECTED.search(str(error))
        if unexpected is not None and unexpected[1] in {"grad", *given}:
            raise StateError(
                "optax.chain, partition and similar wrappers pass all extra arguments to each of "
                f"their optimizers, and one of these does not accept {unexpected[1]!r} ({error}). "
                "Put it outermost, or wrap it: distaff.optim.with_known_args(optimizer)."
            ) from error
        if _MISSING.search(str(error)):
            raise StateError(
                f"The optimizer needs more than {', '.join(['grad', *given])} ({error}). Call "
                "state.apply_gradients(grads=grads, value=loss, value_fn=lambda params: ...), with "
                "any other argument in optimizer_args."
            ) from error
        raise


def prepare_gradients(grads: Params, opt_state: PyTree, whole: Params) -> Params:
    """Checks gradients, and conjugates complex ones so that they point uphill.

    Args:
        grads: gradients from `jax.grad`, with the shapes of the parameters, or with a leading axis
            of examples.
        opt_state: state of the optimizer.
        whole: the parameters.

    Raises:
        StateError: they have other shapes, or the optimizer needs the gradient of each example.
    """
    if contains(opt_state, optax.LookaheadState) and not isinstance(whole, optax.LookaheadParams):
        raise StateError(
            "optax.lookahead trains optax.LookaheadParams, but the parameters are of type "
            f"{type(whole).__name__}. Create the state with "
            "params=optax.LookaheadParams.init_synced(params), differentiate the loss with respect "
            "to state.params.fast, and evaluate with state.params.slow."
        )
    params = whole
    if isinstance(whole, optax.LookaheadParams):
        params, grads = whole.fast, getattr(grads, "fast", grads)
    if num_per_example(grads, params) is not None:
        return descending(grads)
    check_gradients(grads, params)
    if contains(opt_state, optax.contrib.DifferentiallyPrivateAggregateState):
        raise StateError(
            "optax.contrib.dpsgd clips the gradient of each example and adds noise to their mean, "
            "so it needs gradients [examples, *shape]; it got the mean gradient of a batch, where "
            "its noise does not protect privacy. Override create_functions with a train_step "
            "that computes jax.vmap(jax.grad(loss), (None, 0))(state.params, batch), and returns "
            "state.apply_gradients(grads=...)."
        )
    return descending(grads)


def keep_frozen_statistics(tx: Any, before: PyTree, after: PyTree) -> PyTree:
    """Returns running statistics after a step, with frozen parts as before it."""
    keeps = getattr(tx, "keeps", None)
    if keeps is None or jax.tree.structure(before) != jax.tree.structure(after):
        return after
    return jax.tree_util.tree_map_with_path(
        lambda path, old, new: old if keeps(leaf_name(path)) else new, before, after
    )


def is_masked(node: Any) -> bool:
    """Returns whether a node of a pytree replaces masked parameters."""
    return isinstance(node, optax.MaskedNode)


def unmask(shown: PyTree, params: Params) -> Params:
    """Returns a pytree whose masked leaves are taken from `params`."""
    return jax.tree.map(
        lambda own, full: full if is_masked(own) else own, shown, params, is_leaf=is_masked
    )


def _accepting_masked(
    value_fn: Callable[..., jax.Array], params: Params
) -> Callable[..., jax.Array]:
    """Returns `value_fn` as a function of partly masked parameters; masked ones are held fixed."""

    @functools.wraps(value_fn)  # A line search reads its signature.
    def of_shown(shown: Params, *args: Any, **kwargs: Any) -> jax.Array:
        # A copy differs from the state's own parameters, and costs nothing in a program.
        whole = jax.tree.map(jnp.copy, unmask(shown, params))
        return value_fn(whole, *args, **kwargs)

    return of_shown


def _with_frozen_averages(before: PyTree, after: PyTree, updates: Params) -> PyTree:
    """Returns an optimizer's state in which averages of frozen parameters are unchanged.

    `optax.contrib.schedule_free` moves the point that it averages even if a later transformation,
    such as `optax.freeze`, drops the update; the average is used for evaluation.
    """
    kind = optax.contrib.ScheduleFreeState

    def is_average(node: Any) -> bool:
        return isinstance(node, kind)

    def freeze(old: Any, new: Any) -> Any:
        if not is_average(new) or not _has_structure(new.z, updates):
            return new
        moved = jax.tree.map(
            lambda z, z_before, update: (
                z if is_masked(z) else jnp.where((update != 0).any(), z, z_before)
            ),
            *(new.z, old.z, updates),
            is_leaf=is_masked,
        )
        return new._replace(z=moved)

    if not contains(after, kind):
        return after
    return jax.tree.map(freeze, before, after, is_leaf=is_average)


def _has_structure(shown: PyTree, params: Params) -> bool:
    """Returns whether a tree has the structure of parameters, apart from masked ones."""
    try:
        jax.tree.map(lambda *_: None, shown, params, is_leaf=is_masked)
    except (TypeError, ValueError):
        return False
    return True

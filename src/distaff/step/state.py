"""TrainState: everything a training step may update, held in one immutable pytree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distaff.core import optional
from distaff.core.equations import named_scope
from distaff.core.pytrees import FrozenPyTree, static
from distaff.core.typing import Key, Params, PyTree
from distaff.core.views import html
from distaff.core.views.brief import arrays_table, brief, num_values, scalar
from distaff.errors import StateError, nearest
from distaff.optim.gradients import check_gradients, check_params, check_trainable
from distaff.optim.transforms import extra_args


class TrainState(FrozenPyTree):
    """The state of training: `step` counts the completed optimizer updates of the whole state.

    Subclass it to add members; each annotated member becomes part of the pytree:

    >>> class StateWithEpoch(TrainState):
    ...     epoch: jax.Array

    `apply_gradients` updates `step`, `params` and `opt_state`. To change any other member, use
    `replace` or pass it to `apply_gradients` as a keyword.

    Args:
        step: number of completed updates, int32 scalar.
        params: the trainable parameters.
        opt_state: the optimizer's state; None without an optimizer.
        batch_stats: running statistics of normalisation layers; None for a model without them.
        collections: other mutable variables of the model, by collection name; None without.
        rng: the root key, which never changes: a step uses `jax.random.fold_in(rng, step)`.
        guard: the state of the trainer's guard against bad numbers; None without one.
        averages: averages of the weights by name, `"ema"` or `"swa"`; None without.
        apply_fn: the model's forward pass, `apply_fn(variables, *inputs)`.
        tx: the Optax optimizer.
    """

    step: jax.Array
    params: Params
    opt_state: PyTree = None
    batch_stats: PyTree = None
    collections: Mapping[str, PyTree] | None = None
    rng: Key | None = None
    guard: PyTree = None
    averages: Mapping[str, Any] | None = None
    apply_fn: Callable[..., Any] | None = static(default=None)
    tx: optax.GradientTransformation | None = static(default=None)

    def __repr__(self) -> str:
        optimizer = num_values(self.opt_state)
        return brief(
            self,
            f"step {scalar(self.step)}",
            f"{num_values(self.params):,} parameters",
            f"{optimizer:,} values of the optimizer" if optimizer else "",
        )

    def _repr_html_(self) -> str:
        try:
            view = optional.load("notebook.treescope", extra="notebook").as_html(self.arrays())
            return html.details(repr(self), view)
        except Exception:  # not installed, or an array was donated to a step
            return html.details(repr(self), arrays_table(self))

    @classmethod
    def create(
        cls,
        *,
        params: Params,
        tx: optax.GradientTransformation | None = None,
        apply_fn: Callable[..., Any] | None = None,
        **members: Any,
    ) -> Self:
        """Creates the state before the first step.

        Args:
            params: initial parameters.
            tx: any Optax optimizer; None for a state that is only evaluated.
            apply_fn: the model's forward pass, such as `model.apply`.
            **members: any other member, by name.

        Returns:
            A state with `step` 0 and the optimizer's initial state.

        Raises:
            StateError: a keyword is not a member of this class, `params` holds an optimizer's
                state, or `tx` is given and an array of `params` is neither float nor complex.
        """
        cls._check_members(members, reserved=("opt_state",))
        check_params(params)
        if tx is not None:
            check_trainable(params)
        step = members.get("step", 0)
        if not isinstance(step, jax.Array):
            step = jnp.asarray(np.asarray(step, np.int32))  # compiles nothing
        members["step"] = step.astype(jnp.int32)
        return cls(
            **members,
            params=params,
            opt_state=None if tx is None else tx.init(params),
            apply_fn=apply_fn,
            tx=tx,
        )

    def replace(self, **members: Any) -> Self:
        """Returns a copy with the named members changed.

        Raises:
            StateError: a keyword is not a member of this class.
        """
        self._check_members(members)
        check_params(members.get("params"))
        return dataclasses.replace(self, **members)

    def apply_gradients(
        self,
        *misplaced: Any,
        grads: Params = None,
        value: jax.Array | None = None,
        value_fn: Callable[[Params], jax.Array] | None = None,
        optimizer_args: Mapping[str, Any] | None = None,
        **members: Any,
    ) -> Self:
        """Returns the state after one optimizer update.

        Args:
            *misplaced: not allowed; pass every argument by keyword.
            grads: gradient of the loss, with the structure of `params`, as `jax.grad` returns it
                (gradients of complex parameters are conjugated here). An optimizer that aggregates
                per-example gradients (`optax.contrib.dpsgd`) takes leaves `[examples, *shape]`;
                `optax.lookahead` takes the gradient of `params.fast`.
            value: the loss, a scalar. Passed with `grad=grads` to optimizers that accept it
                (`optax.contrib.reduce_on_plateau`, line searches, learned optimizers).
            value_fn: the loss as a function of the parameters, for line searches, and to derive
                `grad_fn` for optimizers that take it (`optax.contrib.sam` in its opaque mode).
            optimizer_args: further keyword arguments of the optimizer's `update`.
            **members: other members of the state, with their new values.

        Returns:
            A new state: `step + 1`, new `params` and `opt_state`.

        Raises:
            StateError: the state has no optimizer, an argument that the optimizer requires is
                missing, `grads` and `params` differ in structure or shapes, or a keyword is not a
                member of this class.
        """
        if misplaced or grads is None:
            raise StateError(
                "apply_gradients takes keyword arguments only. "
                "Write state.apply_gradients(grads=grads)."
            )
        if self.tx is None:
            raise StateError(
                "apply_gradients needs an optimizer, and this state has none (tx=None). "
                "Create it with TrainState.create(params=..., tx=optax.adam(1e-3))."
            )
        self._check_members(members, reserved=("step", "params", "opt_state"))
        offered = {"value": value, "value_fn": value_fn, **(optimizer_args or {})}
        with named_scope("optimizer"):
            grads = extra_args.prepare_gradients(grads, self.opt_state, self.params)
            updates, opt_state = extra_args.update(
                self.tx, grads, self.opt_state, self.params, offered
            )
            check_gradients(updates, self.params)
            params = optax.apply_updates(self.params, updates)
        if "batch_stats" in members:
            members["batch_stats"] = extra_args.keep_frozen_statistics(
                self.tx, self.batch_stats, members["batch_stats"]
            )
        return dataclasses.replace(
            self, step=self.step + 1, params=params, opt_state=opt_state, **members
        )

    def arrays(self) -> dict[str, PyTree]:
        """Returns the members that hold arrays, which a checkpoint saves, by name."""
        fields = [f for f in dataclasses.fields(self) if not f.metadata.get("static", False)]
        left_out = ("averages",) if self.averages is None else ()
        return {f.name: getattr(self, f.name) for f in fields if f.name not in left_out}

    @classmethod
    def _check_members(cls, members: Mapping[str, Any], reserved: tuple[str, ...] = ()) -> None:
        known = [f.name for f in dataclasses.fields(cls) if f.name not in reserved]
        for name in members:
            if name not in known:
                raise StateError(
                    f"{cls.__name__} has no member {name!r} to set here. {nearest(name, known)} "
                    f"To add a member, subclass it: class MyState({cls.__name__}): {name}: ..."
                )


def strongly_typed(tree: PyTree) -> PyTree:
    """Returns a tree without weakly typed arrays, which come from Python numbers.

    If the weak types of a state change in a step, the step compiles twice.
    """

    def strong(leaf: jax.Array) -> jax.Array:
        form = jax.typeof(leaf)
        return jax.lax.convert_element_type(leaf, form.dtype) if form.weak_type else leaf

    return jax.tree.map(strong, tree)


def is_intact(state: TrainState | None) -> bool:
    """Returns whether no array of a state was donated or deleted."""
    leaves = jax.tree.leaves(state)
    return not any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves)

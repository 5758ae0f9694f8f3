"""Context: what a loss function needs besides parameters and batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distaff.core.typing import Key, Params
from distaff.errors import ConfigError, LossError, StateError
from distaff.metrics import PerExample
from distaff.metrics.limits import Limits
from distaff.models import Variables, model_of
from distaff.models.flags import names_mode
from distaff.models.functional import FunctionModel, Functions
from distaff.models.observed import Observed, observing
from distaff.models.randomness import NoKeyError, is_key
from distaff.optim import decay_mask, decays, l2_loss
from distaff.step.call_site import CallSite, same_leaves
from distaff.step.state import TrainState

_EVALUATION = 0x6576616C


class Context:
    """What a loss function needs besides parameters and batch. It lives for one trace.

    Attributes:
        state: the state before the step. Differentiate with respect to the loss function's own
            `params` argument, not `state.params`: JAX differentiates a function by its arguments.
        train: True in a training step, False in evaluation and prediction.
        penalty: the sum of what was added to the loss as a penalty; None without.
        limits: what `check_range` was given, by the name of a metric.
    """

    def __init__(self, state: TrainState, *, train: bool) -> None:
        self.state = state
        self.train = train
        self._batch_stats = state.batch_stats
        self._collections = state.collections
        self._root: Key | None = None
        if state.rng is not None:
            # Evaluation draws the same numbers whatever the step, so that its results compare.
            tag = state.step if train else jnp.uint32(_EVALUATION)
            self._root = jax.random.fold_in(state.rng, tag)
        self._applied = 0
        self.penalty: jax.Array | None = None
        self.limits: dict[str, PerExample] = {}
        self._place = CallSite.here()

    @property
    def rng(self) -> Key:
        """The step's own random key, `fold_in(state.rng, state.step)`; a fixed one in evaluation.

        Raises:
            StateError: the state has no root key.
        """
        if self._root is None:
            raise StateError(
                "ctx.rng needs a root key, and TrainState.rng is None. "
                "Create the state with TrainState.create(..., rng=jax.random.key(0))."
            )
        return self._root

    def apply(self, params: Params, *inputs: Any, **kwargs: Any) -> Any:
        """Runs the model's forward pass.

        Dropout and running statistics are taken care of: each call draws from its own key, and in
        training a changed statistic is seen by the next call and kept in the new state.

        Args:
            params: the loss function's own `params` argument, or collections by name, `{"params":
                params, ...}`; of those that are not given, the pass has the state's.
            *inputs: handed to the model.
            **kwargs: handed to the model; they win over what would be passed for its mode. `train=`
                is the mode of the pass, whatever the model's name for it. `rngs=` or `key=` is
                the key to draw from instead of the call's own, which a loop needs. For Flax,
                `mutable=` names collections to be returned besides, such as what modules sow.

        Returns:
            The model's outputs; `(outputs, collections)` with `mutable=`.

        Raises:
            LossError: in training, `params` is `state.params`, which is not differentiated; or the
                pass is in a loop, or another transformation, and draws from the key of the call or
                changes variables there.
        """
        params, given = self._collections_of(params)
        self._check_differentiated(params)
        place = self._place.of_call()
        model = model_of(self.state.apply_fn)
        key = self._key(place)
        # A forward function of the user's own may have an argument `rngs` itself.
        for name in ("key",) if isinstance(model, FunctionModel) else ("key", "rngs"):
            if is_key(kwargs.get(name)):
                key = kwargs.pop(name)
        before = Variables.of({**self._held(params), **given})
        observed, train = None, kwargs.pop("train", None)
        if train is None and not names_mode(kwargs):
            observed = Observed(self.train, type(model.module).__name__)
            model = observing(model, observed)
        train = self.train if train is None else train
        _check_keywords(train, kwargs)
        try:
            outputs, after = model.apply(before, *inputs, train=train, key=key, **kwargs)
        except NoKeyError as error:
            raise place.loop_error(error) if place.is_repeated else error from None
        if observed is not None:
            observed.check()
        self._keep(before, after, place)
        return outputs

    def _held(self, params: Params) -> dict[str, Any]:
        return Variables(params, self._batch_stats, self._collections).by_collection()

    def _collections_of(self, params: Any) -> tuple[Params, dict[str, Any]]:
        """Returns the parameters, and the other collections that are passed with them."""
        if not isinstance(params, Mapping) or "params" not in params:
            return params, {}
        own, inner = self.state.params, params["params"]
        is_function = isinstance(model_of(self.state.apply_fn), FunctionModel | Functions)
        # A model of functions may call a part of its parameters so; of another one, the state may
        # hold what `module.init` returned as it is.
        if is_function and isinstance(own, Mapping) and "params" in own and set(inner) != set(own):
            return params, {}
        return inner, {name: x for name, x in params.items() if name != "params"}

    def _key(self, place: CallSite) -> Key | None:
        """Returns the call's own key; None in a loop, which would draw the same in each turn."""
        number, self._applied = 1 + self._applied, self._applied + 1
        if self._root is None or place.is_repeated:
            return None
        return jax.random.fold_in(self._root, number)

    def _keep(self, before: Variables, after: Variables, place: CallSite) -> None:
        """Keeps what a pass has changed of the state's collections."""
        held, changed = before.by_collection(), after.by_collection()
        moved = [
            name
            for name in self._held(before.params)
            if name != "params" and not same_leaves(held.get(name), changed.get(name))
        ]
        if moved and place.is_inner:
            raise place.change_error(moved)
        if not moved:
            return
        if self._batch_stats is not None:
            self._batch_stats = changed.get("batch_stats", self._batch_stats)
        if self._collections is not None:
            self._collections = {n: changed.get(n, x) for n, x in self._collections.items()}

    def _check_differentiated(self, params: Params) -> None:
        own = {id(leaf) for leaf in jax.tree.leaves(self.state.params)}
        if self.train and any(id(leaf) in own for leaf in jax.tree.leaves(params)):
            raise LossError(
                "In training ctx.apply takes the loss function's own argument `params`; it was "
                "given state.params, whose gradient is zero: JAX differentiates a function with "
                "respect to its arguments. Write ctx.apply(params, ...)."
            )

    def add_penalty(self, value: jax.Array) -> None:
        """Adds a penalty to what training differentiates, and to no loss that is reported.

        The metric "loss" stays the loss of the data, in training as in evaluation, where a penalty
        is left out; the metric "penalty" of a training step is the sum of its penalties.

        Args:
            value: a float scalar, a function of the loss function's own `params` or its outputs.

        Raises:
            LossError: `value` is no float scalar, or is added inside a JAX transformation.
        """
        place = self._place.of_call()
        if place.is_inner:
            raise place.change_error(["a penalty"])
        value = jnp.asarray(value)
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise LossError(
                f"A penalty is a float scalar, and has shape {value.shape} and dtype "
                f"{value.dtype}. Sum or average it first."
            )
        self.penalty = value if self.penalty is None else self.penalty + value

    def check_indices(
        self, what: str, indices: jax.Array, size: int, *, where: Any = None, advice: str = ""
    ) -> None:
        """Has the run end where an index of any batch is out of range; see `check_range`.

        JAX takes the index -1 for the last entry, and gives NaN for one that is too large: without
        this, the model trains on both.

        Args:
            what: what they are, for the error: `"label"`.
            indices: int `[batch, ...]`.
            size: they are from 0 to `size - 1`.
            where: bool, with the shape of `indices`: which of them count; None for all.
            advice: a sentence with the remedy, for the error.

        Raises:
            LossError: they are no integers, or `where` has another shape.
        """
        if not jnp.issubdtype(indices.dtype, jnp.integer):
            raise LossError(
                f"Indices are integers; {what!r} has dtype {indices.dtype}. Cast it: "
                ".astype(jnp.int32)."
            )
        rule = f"A {what} is an index from 0 to {size - 1}"
        self.check_range(rule, indices, 0, size - 1, where=where, advice=advice)

    def check_range(
        self,
        rule: str,
        values: jax.Array,
        least: float,
        most: float | None = None,
        *,
        where: Any = None,
        advice: str = "",
    ) -> None:
        """Has the run end where a value of any batch is out of range, NaN or infinite.

        The step notes the range, and the host reads it with the metrics: no step waits for it. The
        error, `BatchError`, names the batch and the value; `on_bad_input` makes it a warning. Call
        it in the loss itself, not in a function that `jax.vmap`, `scan` or `grad` transforms.

        Args:
            rule: what must hold, as a clause, for the error: `"A weight is at least 0"`.
            values: numbers `[batch, ...]`.
            least: the least value that is allowed.
            most: the largest one; None for any that is finite.
            where: bool, with the shape of `values`: which of them count; None for all.
            advice: a sentence with the remedy, for the error.

        Raises:
            LossError: `where` has another shape.
        """
        name = f"limits {len(self.limits)}"
        self.limits[name] = Limits.per_example(
            rule, values, least, most, where=where, advice=advice
        )

    def add_l2_loss(self, params: Params, coefficient: float, mask: Any = decay_mask) -> None:
        """Adds the penalty `optim.l2_loss(params, coefficient, mask)`.

        Prefer the optimizer's weight decay.

        Args:
            params: the loss function's own `params` argument, or a part of it.
            coefficient: strength of the penalty; its gradient is `coefficient * p`.
            mask: which parameters it applies to; biases and norm scales are left alone.

        Raises:
            ConfigError: the optimizer decays the parameters too.
        """
        tx = self.state.tx
        is_off = isinstance(coefficient, int | float) and coefficient == 0
        if self.train and not is_off and tx is not None and decays(tx, self.state.params):
            raise ConfigError(
                "Decay is in one place, and here it is in two: ctx.add_l2_loss with coefficient "
                f"{coefficient!r}, and an optimizer that decays the parameters itself (optax.adamw "
                "does by default). Remove ctx.add_l2_loss, or give the optimizer weight_decay=0."
            )
        self.add_penalty(l2_loss(params, coefficient, mask))

    @property
    def changed(self) -> dict[str, Any]:
        """Members of the state that the forward passes changed, with their new values."""
        return {"batch_stats": self._batch_stats, "collections": self._collections}


def _check_keywords(train: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuses two keywords that mean something else to every model."""
    if not isinstance(train, bool):
        raise ConfigError(
            "train=... of ctx.apply says whether the pass trains, True or False; got "
            f"{type(train).__name__}. Pass an input of that name by position."
        )
    if "key" in kwargs:
        raise ConfigError(
            "key=... of ctx.apply is the random key of the pass; got "
            f"{type(kwargs['key']).__name__}. Pass an input of that name by position."
        )

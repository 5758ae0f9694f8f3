"""Context: the third argument of a loss function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distaff.core.typing import Key, Params
from distaff.errors import ConfigError, LossError, StateError
from distaff.metrics import PerExample
from distaff.metrics.limits import Limits
from distaff.models import Variables, model_of, plain_model, with_scale
from distaff.models.flags import names_mode
from distaff.models.functional import FunctionModel, Functions
from distaff.models.observed import Observed, observing
from distaff.models.randomness import NoKeyError, is_key
from distaff.optim import decay_mask, decays, l2_loss, loss_scale
from distaff.step.averages import RAW, averaged, find
from distaff.step.call_site import CallSite, same_leaves
from distaff.step.state import TrainState

_EVALUATION = 0x6576616C


class Context:
    """The model, random keys and checks for a loss function. It lives for one trace.

    Attributes:
        state: the state before the step. Use the loss function's own `params` argument instead of
            `state.params`: JAX differentiates a function with respect to its arguments.
        train: True in a training step, False in evaluation and prediction.
        penalty: the sum of the penalties that were added to the loss; None without.
        limits: the ranges passed to `check_range`, by the name of a metric.
    """

    def __init__(self, state: TrainState, *, train: bool) -> None:
        self.state = state
        self.train = train
        self._batch_stats = state.batch_stats
        self._collections = state.collections
        self._root: Key | None = None
        if state.rng is not None:
            # Evaluation draws the same numbers at every step, so that its results are comparable.
            tag = state.step if train else jnp.uint32(_EVALUATION)
            self._root = jax.random.fold_in(state.rng, tag)
        self._applied = 0
        self.penalty: jax.Array | None = None
        self.limits: dict[str, PerExample] = {}
        self._site = CallSite.here()

    @property
    def rng(self) -> Key:
        """The random key of the step, `fold_in(state.rng, state.step)`; a fixed one in evaluation.

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

        Handles dropout and running statistics: each call draws from its own key, and in training
        updated statistics are used by the next call and kept in the new state.

        Args:
            params: the loss function's own `params` argument, or collections by name, `{"params":
                params, ...}`; missing collections default to the state's.
            *inputs: passed to the model.
            **kwargs: passed to the model, overriding the default mode. `train=` sets the mode of
                the pass, whatever the model calls it. `rngs=` or `key=` replaces the call's own
                key, which a loop needs. For Flax, `mutable=` names collections to return too, such
                as those that modules sow. `weights="ema"` or `"swa"` runs the model with an average
                of the weights instead of `params`: without gradient, and changing no statistics.

        Returns:
            The model's outputs; `(outputs, collections)` with `mutable=`.

        Raises:
            LossError: in training, `params` is `state.params`, which is not differentiated; or the
                pass is inside a loop or another transformation, and draws from the call's own key
                or changes variables there.
        """
        params, given = self._split_collections(params)
        # A model may have an input `weights` itself, which is an array.
        weights = kwargs.pop("weights") if isinstance(kwargs.get("weights"), str) else RAW
        held = self._held(params) if weights == RAW else self._averaged(weights)
        self._check_differentiated(held["params"])
        place = self._site.of_call()
        model = model_of(self.state.apply_fn)
        if self.train:
            model = with_scale(model, loss_scale(self.state.opt_state))
        key = self._key(place)
        # A custom forward function may have an argument `rngs` itself.
        for name in ("key",) if isinstance(plain_model(model), FunctionModel) else ("key", "rngs"):
            if is_key(kwargs.get(name)):
                key = kwargs.pop(name)
        before = Variables.of({**held, **given})
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
        if weights == RAW:
            self._keep(before, after, place)
        return outputs

    def _averaged(self, weights: str) -> dict[str, Any]:
        """Returns an average of the weights as collections by name."""
        state = averaged(find(self.state, weights), self.state)
        return Variables(state.params, state.batch_stats, state.collections).by_collection()

    def _held(self, params: Params) -> dict[str, Any]:
        return Variables(params, self._batch_stats, self._collections).by_collection()

    def _split_collections(self, params: Any) -> tuple[Params, dict[str, Any]]:
        """Splits `params` into the parameters and the other collections passed with them."""
        if not isinstance(params, Mapping) or "params" not in params:
            return params, {}
        own, inner = self.state.params, params["params"]
        model = plain_model(model_of(self.state.apply_fn))
        is_function = isinstance(model, FunctionModel | Functions)
        # In a model of functions, "params" may name a part of the parameters; for other models,
        # the state may hold the return value of `module.init` unchanged.
        if is_function and isinstance(own, Mapping) and "params" in own and set(inner) != set(own):
            return params, {}
        return inner, {name: x for name, x in params.items() if name != "params"}

    def _key(self, place: CallSite) -> Key | None:
        """Returns the call's own key; None in a loop, whose iterations would all draw the same."""
        number, self._applied = 1 + self._applied, self._applied + 1
        if self._root is None or place.is_repeated:
            return None
        return jax.random.fold_in(self._root, number)

    def _keep(self, before: Variables, after: Variables, place: CallSite) -> None:
        """Keeps the collections of the state that a pass has changed."""
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
                "In training, ctx.apply takes the loss function's own argument `params`; it got "
                "state.params, whose gradient is zero: JAX differentiates a function with "
                "respect to its arguments. Write ctx.apply(params, ...)."
            )

    def add_penalty(self, value: jax.Array) -> None:
        """Adds a penalty to the objective that training differentiates, not to the reported loss.

        The metric "loss" is always the loss of the data. The metric "penalty" of a training step
        is the sum of its penalties; evaluation ignores penalties.

        Args:
            value: a float scalar, computed from the loss function's own `params` or the outputs.

        Raises:
            LossError: `value` is not a float scalar, or is added inside a JAX transformation.
        """
        place = self._site.of_call()
        if place.is_inner:
            raise place.change_error(["a penalty"])
        value = jnp.asarray(value)
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise LossError(
                f"A penalty is a float scalar; got shape {value.shape} and dtype "
                f"{value.dtype}. Sum or average it first."
            )
        self.penalty = value if self.penalty is None else self.penalty + value

    def check_indices(
        self, what: str, indices: jax.Array, size: int, *, where: Any = None, advice: str = ""
    ) -> None:
        """Ends the run if an index of any batch is out of range; see `check_range`.

        Without this check the model trains on invalid indices: in JAX, -1 is the last entry, and an
        index that is too large gives NaN.

        Args:
            what: name of the indices, for the error: `"label"`.
            indices: int `[batch, ...]`.
            size: number of valid indices, from 0 to `size - 1`.
            where: bool, with the shape of `indices`: which of them to check; None for all.
            advice: a sentence with the remedy, for the error.

        Raises:
            LossError: `indices` are not integers, or `where` has another shape.
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
        """Ends the run if a value of any batch is out of range, NaN or infinite.

        The step records the range, and the host reads it with the metrics, so no step waits. The
        `BatchError` names the batch and the value; `on_bad_input` turns it into a warning. Call
        this in the loss itself, not in a function that `jax.vmap`, `scan` or `grad` transforms.

        Args:
            rule: the rule as a clause, for the error: `"A weight is at least 0"`.
            values: numbers `[batch, ...]`.
            least: smallest allowed value.
            most: largest allowed value; None for any finite value.
            where: bool, with the shape of `values`: which of them to check; None for all.
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
            mask: which parameters it applies to; by default not to biases and norm scales.

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
        """The mutable members of the state, with their values after the forward passes."""
        return {"batch_stats": self._batch_stats, "collections": self._collections}


def _check_keywords(train: Any, kwargs: Mapping[str, Any]) -> None:
    """Raises if `train` or `key` is used as a name for an input of the model."""
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

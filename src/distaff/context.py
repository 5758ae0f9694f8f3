"""Context: what a loss function needs besides parameters and batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distaff.errors import ConfigError, LossError, StateError
from distaff.metrics import PerExample
from distaff.metrics.limits import Limits
from distaff.models import Variables, model_of
from distaff.optim import decay_mask, decays, l2_loss
from distaff.state import TrainState
from distaff.typing import Key, Params

_EVALUATION = 0x6576616C


class Context:
    """What a loss function needs besides parameters and batch. It lives for one trace.

    Attributes:
        state: the state before the step. Differentiate with respect to the loss function's own
            `params` argument, not `state.params`: JAX differentiates a function by its arguments.
        train: True in a training step, False in evaluation and prediction.
        penalty: the sum of what was added to the loss as a penalty; None without.
        limits: what `check_indices` and `check_weights` were given, by the name of a metric.
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
            params: the loss function's own `params` argument, or `{"params": params}`.
            *inputs: handed to the model.
            **kwargs: handed to the model; they win over what would be passed for `train`.

        Returns:
            The model's outputs.

        Raises:
            LossError: in training, `params` is `state.params`, which is not differentiated.
        """
        if isinstance(params, Mapping) and set(params) == {"params"}:
            params = params["params"]
        self._check_differentiated(params)
        key = None if self._root is None else jax.random.fold_in(self._root, 1 + self._applied)
        self._applied += 1
        outputs, variables = model_of(self.state.apply_fn).apply(
            Variables(params, self._batch_stats, self._collections),
            *inputs,
            train=self.train,
            key=key,
            **kwargs,
        )
        self._batch_stats, self._collections = variables.batch_stats, variables.collections
        return outputs

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
            LossError: `value` is no float scalar.
        """
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
        """Has the run end where an index of any batch is out of range; costs no wait for the host.

        JAX takes the index -1 for the last entry, and gives NaN for one that is too large: without
        this, both train.

        Args:
            what: what they are, for the error: `"label"`.
            indices: int `[batch, ...]`.
            size: they are from 0 to `size - 1`.
            where: bool, with the shape of `indices`: which of them count; None for all.
            advice: a sentence with the remedy, for the error.

        Raises:
            LossError: they are no integers, or `where` has another shape.
        """
        self._note(what, Limits.per_example(what, indices, size=size, where=where, advice=advice))

    def check_weights(self, what: str, weights: jax.Array, *, advice: str = "") -> None:
        """Has the run end where a weight of any batch is negative, NaN or infinite.

        Args:
            what: what they are, for the error: `"sample weight"`.
            weights: `[batch, ...]`.
            advice: a sentence with the remedy, for the error.
        """
        self._note(what, Limits.per_example(what, weights, size=None, where=None, advice=advice))

    def _note(self, what: str, limits: PerExample) -> None:
        name, number = f"limits of {what}", 2
        while name in self.limits:
            name, number = f"limits of {what} {number}", number + 1
        self.limits[name] = limits

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

"""VeLO: a trained network as an Optax transformation."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from distaff.core.typing import Params, PyTree
from distaff.errors import ConfigError, LossError, StateError
from distaff.optim.learned.features import (
    LossAverages,
    Moments,
    init_loss_averages,
    init_moments,
    parameter_features,
    tensor_features,
    update_loss_averages,
    update_moments,
)
from distaff.optim.learned.network import (
    LSTMState,
    TinyMLP,
    initial_lstm_state,
    make_network,
    run_lstm,
    run_mlp,
)
from distaff.optim.learned.settings import VeloWeights
from distaff.optim.learned.weights import read_weights
from distaff.optim.transforms.accumulate import accumulate
from distaff.optim.transforms.masks import decay_mask

_LARGEST_GRADIENT = 1000.0
_BUGGED_HORIZON = 10


class VeloState(NamedTuple):
    """The state of VeLO.

    Attributes:
        step: number of updates, int32 `[]`.
        moments: running averages of gradients, one `Moments` per parameter.
        lstm: memory of the LSTM, one row per parameter.
        losses: running averages of the loss.
    """

    step: jax.Array
    moments: PyTree
    lstm: LSTMState
    losses: LossAverages


def velo(
    weights: VeloWeights | str | os.PathLike[str],
    total_steps: int,
    *,
    weight_decay: float = 0.0,
    mask: Callable[[Params], PyTree] | PyTree | None = decay_mask,
    accumulate_above: int = 150_000,
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer VeLO (Metz et al. 2022, arXiv:2211.09760).

    It has no learning rate. Every `update` needs `value=loss`, which a train step passes, and the
    steps depend on the length of the run. It uses all tensors jointly; under a mask, those that it
    sees. It stores four numbers for each parameter of a matrix, and seven for each of a vector.

    It was trained on runs of up to 200,000 steps. Like the original, for more than 150,000 steps it
    averages gradients and losses over as few steps as needed to make at most 150,000 updates.

    `weight_decay` is decoupled (Loshchilov & Hutter 2019, arXiv:1711.05101): each update also
    subtracts `weight_decay * p` from the parameters, unseen by the network. The original instead
    adds `weight_decay * p` to the gradients and `weight_decay * sum(p ** 2)` to the loss, over all
    parameters including biases; the effect depends on the network, which rescales both. To
    reproduce it, leave `weight_decay` at 0 and call `ctx.add_l2_loss(params, weight_decay)` in the
    loss function: gradients then equal the original's, the loss has half of its sum, and biases and
    norm scales are excluded unless `mask` includes them.

    Args:
        weights: the folder for `read_weights`, or its result.
        total_steps: steps of the whole run.
        weight_decay: fraction of a parameter that each update subtracts, independent of any
            learning rate. The original's docstring considers 1e-6 of its own form sufficient.
        mask: parameters to decay: a pytree of bool like `params`, a function that returns one, or
            None for all. By default all except biases and norm scales.
        accumulate_above: maximum number of updates.

    Returns:
        An optimizer whose state is a `VeloState`, nested in the states of accumulation and decay if
        used. All of it is float32 and int32; updates have the dtype of the gradients.

    Raises:
        ConfigError: a number is out of its range.
        CheckpointError: the weights are missing, or do not belong to such a network.
        LossError: from `update`, if `value` is missing or not a scalar.
        StateError: from `update`, if `params` is missing.
    """
    for name, count in (("total_steps", total_steps), ("accumulate_above", accumulate_above)):
        if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
            raise ConfigError(f"{name} of VeLO must be an int >= 1; got {count!r}.")
    if not isinstance(weight_decay, int | float) or not 0 <= weight_decay < math.inf:
        raise ConfigError(f"weight_decay must be a finite number >= 0; got {weight_decay!r}.")
    every = math.ceil(total_steps / accumulate_above)
    if not isinstance(weights, VeloWeights | str | os.PathLike):
        raise ConfigError(f"weights must be a folder, or VeloWeights; got {weights!r}.")
    if not isinstance(weights, VeloWeights):
        weights = read_weights(weights)
    tx = _velo(weights, total_steps // every)
    if weight_decay > 0:
        tx = optax.chain(tx, optax.add_decayed_weights(-weight_decay, mask))
    return accumulate(tx, every, tail=False)  # the original updates after whole windows only


def _velo(weights: VeloWeights, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer without decay and accumulation."""
    network, settings = make_network(weights), weights.settings
    horizon = _BUGGED_HORIZON if settings.use_bugged_loss_features else num_steps

    def init(params: Params) -> VeloState:
        return VeloState(
            step=jnp.zeros([], jnp.int32),
            moments=jax.tree.map(lambda leaf: init_moments(jnp.shape(leaf)), params),
            lstm=initial_lstm_state(network, len(jax.tree.leaves(params))),
            losses=init_loss_averages(),
        )

    def update(
        updates: Params,
        state: PyTree,
        params: Params | None = None,
        *,
        value: Any = None,
        decay_only: bool = False,
        **extra_args: Any,
    ) -> tuple[Params, PyTree]:
        del extra_args
        grads, structure = jax.tree.flatten(updates)
        if decay_only or not grads:  # optim.decays probes the decay without the network
            return jax.tree.map(jnp.zeros_like, updates), state
        loss = _checked_loss(value, params)
        losses, loss_features = update_loss_averages(state.losses, loss, horizon)
        fraction = state.step.astype(jnp.float32) / num_steps
        leaves = [leaf.astype(jnp.float32) for leaf in structure.flatten_up_to(params)]
        moments = structure.flatten_up_to(state.moments)
        features = [
            _tensor_features(leaf, own, fraction, loss_features)
            for leaf, own in zip(leaves, moments, strict=True)
        ]
        mlps, factors, lstm = run_lstm(network, jnp.stack(features), state.lstm)
        pairs = [
            _tensor_step(*each) for each in zip(mlps, factors, leaves, grads, moments, strict=True)
        ]
        steps, moments = zip(*pairs, strict=True)
        return structure.unflatten(steps), VeloState(
            step=state.step + 1,
            moments=structure.unflatten(moments),
            lstm=state.lstm if settings.use_bugged_next_lstm_state else lstm,
            losses=losses,
        )

    return optax.GradientTransformationExtraArgs(init, update)


_tensor_features = jax.jit(tensor_features)  # Traced once for all tensors of one shape.


@jax.jit
def _tensor_step(
    mlp: TinyMLP, factor: jax.Array, param: jax.Array, grad: jax.Array, moments: Moments
) -> tuple[jax.Array, Moments]:
    """Returns the update of one tensor and its new averages."""
    clipped = jnp.clip(grad.astype(jnp.float32), -_LARGEST_GRADIENT, _LARGEST_GRADIENT)
    moments = update_moments(moments, clipped)
    step = run_mlp(mlp, parameter_features(param, clipped, moments), param, factor)
    return (-step).astype(grad.dtype), moments


def _checked_loss(value: Any, params: Params | None) -> jax.Array:
    if params is None:
        raise StateError(
            "VeLO needs the parameters. Pass them: tx.update(grads, opt_state, params, value=loss)."
        )
    if value is None or jnp.shape(value) != ():
        given = "no `value`" if value is None else f"a `value` of shape {jnp.shape(value)}"
        raise LossError(
            f"VeLO needs the loss, a scalar, and got {given}. Pass it: "
            "tx.update(grads, opt_state, params, value=loss), or "
            "state.apply_gradients(grads=grads, value=loss)."
        )
    return jnp.asarray(value, jnp.float32)

"""HyperV2, VeLO's network: an LSTM over tensors mixes a small MLP for each from a bank.

Metz et al. 2022, "VeLO: Training Versatile Learned Optimizers by Scaling Up" (arXiv:2211.09760).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distaff.optim.learned.settings import FEATURES_PER_PARAMETER, MLP_SHAPES, VeloWeights

_STEP = 0.001
_MAGNITUDE = 0.001
_MIX = 100.0


class LSTMState(NamedTuple):
    """The memory of the LSTM: one row per tensor, each array float32 `[tensors, hidden]`."""

    hidden: jax.Array
    cell: jax.Array


class TinyMLP(NamedTuple):
    """The MLP of one tensor, with the shapes in `MLP_SHAPES`."""

    w0: jax.Array
    b0: jax.Array
    w1: jax.Array
    b1: jax.Array
    w2: jax.Array
    b2: jax.Array


class Network(NamedTuple):
    """The meta-parameters in the layout used for computation.

    They are NumPy arrays, so that a compiled step holds them as constants: the trainer's guard
    against transfers would not let them be fetched from a device.

    Attributes:
        bank: the MLPs, one flat row each, in the order of `TinyMLP`.
        initial: the LSTM's initial memory, by name.
        layers: weight and bias of each layer around the LSTM, by name.
    """

    bank: np.ndarray
    initial: Mapping[str, np.ndarray]
    layers: Mapping[str, tuple[np.ndarray, np.ndarray]]


def make_network(weights: VeloWeights) -> Network:
    """Converts meta-parameters to the layout used for computation."""
    arrays = weights.arrays
    mlp = {path[-1]: array for path, array in arrays.items() if path[0] == "ff_mod_stack"}
    pieces = [mlp[f"w0__{i}"] for i in range(len(FEATURES_PER_PARAMETER))]
    mlp["w0"] = np.concatenate(pieces, axis=1)
    rows = [mlp[name].reshape(len(mlp[name]), -1) for name in MLP_SHAPES]
    names = {path[1] for path in arrays if path[0] == "rnn_params"}
    return Network(
        np.concatenate(rows, axis=1),
        {name: arrays["lstm_init_state", name] for name in LSTMState._fields},
        {n: (arrays["rnn_params", n, "w"], arrays["rnn_params", n, "b"]) for n in names},
    )


def initial_lstm_state(network: Network, num_tensors: int) -> LSTMState:
    """Returns the memory before the first step."""
    initial = network.initial
    return LSTMState(*(jnp.tile(initial[name], [num_tensors, 1]) for name in LSTMState._fields))


def run_lstm(
    network: Network, features: jax.Array, state: LSTMState
) -> tuple[list[TinyMLP], jax.Array, LSTMState]:
    """Runs the LSTM over all tensors.

    Args:
        network: the meta-parameters.
        features: features of each tensor, `[tensors, 30]`.
        state: the LSTM's memory.

    Returns:
        The MLP of each tensor; the factors of their steps, `[tensors]`; the new memory.
    """
    # The output of the layer "linear" of the published networks is unused.
    shared = jax.nn.relu(_linear(network, "linear_1", features)).max(0, keepdims=True)
    inputs = _linear(network, "linear_2", features) + shared
    gates = _linear(network, "rnn/linear", jnp.concatenate([inputs, state.hidden], axis=1))
    admit, candidate, keep, emit = jnp.split(gates, 4, axis=1)
    cell = jax.nn.sigmoid(keep + 1) * state.cell + jax.nn.sigmoid(admit) * jnp.tanh(candidate)
    hidden = jax.nn.sigmoid(emit) * jnp.tanh(cell)
    controls = _linear(network, "rnn_to_controls", hidden)
    mixed = _MIX / len(network.bank) * _matmul(controls, network.bank)
    factors = _linear(network, "step_size", hidden)[:, 0]
    return [_unpack(row) for row in mixed], factors, LSTMState(hidden, cell)


def _unpack(row: jax.Array) -> TinyMLP:
    ends = np.cumsum([math.prod(shape) for shape in MLP_SHAPES.values()])
    parts = jnp.split(row, ends[:-1])
    return TinyMLP(*(part.reshape(s) for part, s in zip(parts, MLP_SHAPES.values(), strict=True)))


def run_mlp(
    mlp: TinyMLP, features: Sequence[jax.Array], param: jax.Array, factor: jax.Array
) -> jax.Array:
    """Returns the step of one tensor, to be subtracted from it.

    The few dozen multiplications per parameter are written out: they compile to one loop over the
    parameters, without an array of features (6 times as fast as matrix products on a CPU).

    Args:
        mlp: the MLP of this tensor.
        features: features of its parameters, from `parameter_features`.
        param: the tensor.
        factor: factor of its step, `[]`.
    """
    axes = tuple(range(1, param.ndim + 1))
    squares = jnp.concatenate([jnp.square(kind).mean(axes) for kind in features])
    # Normalises each feature to a size of 1 by scaling its weights, which are fewer.
    scaled = mlp.w0 * jax.lax.rsqrt(1e-5 + squares)[:, None]
    hidden = _layer([feature for kind in features for feature in kind], scaled, mlp.b0)
    hidden = _layer([jax.nn.relu(each) for each in hidden], mlp.w1, mlp.b1)
    direction, magnitude, _ = _layer([jax.nn.relu(each) for each in hidden], mlp.w2, mlp.b2)
    size = jnp.sqrt(jnp.square(param).mean() + 1e-9)
    return factor * direction * (size * jnp.exp(magnitude * _MAGNITUDE)) * _STEP


def _layer(inputs: Sequence[jax.Array], weight: jax.Array, bias: jax.Array) -> list[jax.Array]:
    """Returns the outputs of a layer, as one array per output."""
    return [
        sum((weight[i, j] * each for i, each in enumerate(inputs)), start=bias[j])
        for j in range(len(bias))
    ]


def _linear(network: Network, name: str, inputs: jax.Array) -> jax.Array:
    weight, bias = network.layers[name]
    return _matmul(inputs, weight) + bias[None]


def _matmul(left: jax.Array, right: jax.Array | np.ndarray) -> jax.Array:
    # The steps depend on small differences, which an accelerator's default precision would lose.
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)

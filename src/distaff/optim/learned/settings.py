"""The settings of HyperV2 networks, and the names and shapes of their meta-parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any

import numpy as np

from distaff.errors import CheckpointError, ConfigError

Path = tuple[str, ...]
"""The path of a meta-parameter in the published file; names from Haiku may contain a slash."""

FEATURES_PER_TENSOR = 30
FEATURES_PER_PARAMETER = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
MLP_WIDTH = 4
MLP_OUTPUTS = 3
MLP_SHAPES = {
    "w0": (sum(FEATURES_PER_PARAMETER), MLP_WIDTH),
    "b0": (MLP_WIDTH,),
    "w1": (MLP_WIDTH, MLP_WIDTH),
    "b1": (MLP_WIDTH,),
    "w2": (MLP_WIDTH, MLP_OUTPUTS),
    "b2": (MLP_OUTPUTS,),
}
"""Shapes of a tensor's MLP; the file stores the rows of `w0` separately, by kind of feature."""

_LARGEST_SIZE = 65536


@dataclass(frozen=True)
class VeloSettings:
    """The settings in which published HyperV2 networks differ, with the original's defaults.

    Args:
        lstm_hidden_size: width of the LSTM over tensors.
        param_inits: number of MLPs in the bank from which each tensor's MLP is mixed.
        use_bugged_next_lstm_state: whether each step starts from the LSTM's initial state. Older
            networks were trained so.
        use_bugged_loss_features: whether the loss is averaged over about 10 steps whatever the
            length of the run, rather than over 10 to `total_steps` steps.

    Raises:
        ConfigError: a size is not an integer from 1 to 65536, or a switch is not a bool.
    """

    _: KW_ONLY
    lstm_hidden_size: int = 128
    param_inits: int = 64
    use_bugged_next_lstm_state: bool = False
    use_bugged_loss_features: bool = True

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            kind = type(each.default)
            in_range = kind is bool or (type(value) is int and 1 <= value <= _LARGEST_SIZE)
            if type(value) is not kind or not in_range:
                rule = "True or False" if kind is bool else f"an int from 1 to {_LARGEST_SIZE}"
                raise ConfigError(f"{each.name} of a VeLO network must be {rule}; got {value!r}.")


RELEASED = VeloSettings(lstm_hidden_size=512, param_inits=256, use_bugged_loss_features=False)
"""The settings of the network that was released as VeLO."""


@dataclass(frozen=True, eq=False)
class VeloWeights:
    """The meta-parameters of a HyperV2 network, from `read_weights` or `init_weights`.

    Args:
        settings: settings of the network.
        arrays: float32 arrays by their path in the published file, with `weight_shapes(settings)`.

    Raises:
        CheckpointError: an array is missing, unexpected, of another shape or dtype, or not finite.
    """

    settings: VeloSettings
    arrays: Mapping[Path, np.ndarray] = field(repr=False)

    def __post_init__(self) -> None:
        expected = weight_shapes(self.settings)
        for path in [*expected, *self.arrays]:
            got = _describe(self.arrays[path]) if path in self.arrays else "missing"
            needed = f"float32{list(expected[path])}" if path in expected else "nothing"
            if got != needed:
                raise CheckpointError(
                    f"A network of {self.settings} has {needed} at {'/'.join(path)!r}; got {got}."
                )
            if not np.isfinite(self.arrays[path]).all():
                raise CheckpointError(f"Some weights at {'/'.join(path)!r} are not finite.")


def _describe(leaf: Any) -> str:
    is_array = isinstance(leaf, np.ndarray)
    return f"{leaf.dtype}{list(leaf.shape)}" if is_array else type(leaf).__name__


def weight_shapes(settings: VeloSettings) -> dict[Path, tuple[int, ...]]:
    """Returns the shape of every meta-parameter by its path; 2,320,385 numbers if `RELEASED`."""
    bank, hidden = settings.param_inits, settings.lstm_hidden_size
    first = {f"w0__{i}": (size, MLP_WIDTH) for i, size in enumerate(FEATURES_PER_PARAMETER)}
    mlp = {**first, **{name: shape for name, shape in MLP_SHAPES.items() if name != "w0"}}
    layers = {
        "linear": (FEATURES_PER_TENSOR, hidden),
        "linear_1": (FEATURES_PER_TENSOR, hidden),
        "linear_2": (FEATURES_PER_TENSOR, hidden),
        "rnn/linear": (2 * hidden, 4 * hidden),
        "rnn_to_controls": (hidden, bank),
        "step_size": (hidden, 1),
    }
    return {
        **{("ff_mod_stack", "~", name): (bank, *shape) for name, shape in mlp.items()},
        **{("lstm_init_state", name): (1, hidden) for name in ("hidden", "cell")},
        **{("rnn_params", name, "w"): shape for name, shape in layers.items()},
        **{("rnn_params", name, "b"): shape[1:] for name, shape in layers.items()},
    }


def init_weights(settings: VeloSettings, seed: int = 0) -> VeloWeights:
    """Returns random weights from which meta-training starts: an untrained optimizer.

    Args:
        settings: settings of the network.
        seed: seed of the random numbers.

    Returns:
        Weights from a normal distribution truncated at two standard deviations of
        `1 / sqrt(inputs)`; biases and the LSTM's initial state are zero.
    """
    random = np.random.default_rng(seed)
    arrays = {}
    for path, shape in weight_shapes(settings).items():
        is_weight = path[-1].startswith("w")
        inputs = MLP_SHAPES["w0"][0] if path[-1].startswith("w0__") else shape[-2:][0]
        drawn = _truncated_normal(random, shape) / np.sqrt(inputs) if is_weight else np.zeros(shape)
        arrays[path] = drawn.astype(np.float32)
    return VeloWeights(settings, arrays)


def _truncated_normal(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    drawn = random.standard_normal(shape)
    while (beyond := np.abs(drawn) > 2).any():
        drawn[beyond] = random.standard_normal(beyond.sum())
    return drawn

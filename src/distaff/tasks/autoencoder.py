"""Autoencoding: inputs that a model reconstructs, as they are or from a corrupted copy."""

from __future__ import annotations

import dataclasses
import math
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.typing import Batch, Key, Params
from distaff.errors import ConfigError, LossError
from distaff.metrics import Mean, filled
from distaff.metrics.monitor import Monitor
from distaff.step.context import Context
from distaff.tasks.weighing import (
    WeighingTask,
    weights_for,
)
from distaff.trainer.config import TrainerConfig

_LARGEST_PSNR = 100.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(TrainerConfig):
    """The options of an `Autoencoder`, beside those of every trainer.

    Args:
        noise: standard deviation of the Gaussian noise that is added to the inputs and not to what
            they are compared with; 0 for none.
        data_range: the difference of the largest and the smallest possible input, for `psnr`.

    Raises:
        ConfigError: an option is out of its range.
    """

    noise: float = 0.0
    data_range: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _is_finite(self.noise) or self.noise < 0:
            raise ConfigError(
                f"noise is a standard deviation, a finite number >= 0; got {self.noise!r}."
            )
        if not _is_finite(self.data_range) or self.data_range <= 0:
            raise ConfigError(f"data_range is a finite number > 0; got {self.data_range!r}.")


class Autoencoder(WeighingTask):
    """Trains a model that returns its input, `[batch, ...]`, by mean squared error.

    With `noise` it is a denoising autoencoder (P. Vincent et al., Extracting and Composing Robust
    Features with Denoising Autoencoders, ICML 2008): the model sees corrupted inputs, in validation
    and test too, and is judged by the clean ones. The noise of an evaluation is the same whatever
    the step, so that results compare. Weights, `sample_weight` or `weight`, or the third item of a
    tuple, weigh loss and metrics: `[batch]`, or with more leading axes of the inputs. The best
    model is the one with the lowest `val/loss`. `predict` returns reconstructions of the inputs as
    they are.

    Args:
        model: as for `TrainerModule`, as every other argument. What `model_inputs` returns first is
            reconstructed; the rest is handed on.
        **options: those of `AutoencoderConfig`, such as `noise=0.3`.
    """

    Config = AutoencoderConfig
    config: AutoencoderConfig
    monitor = Monitor("val/loss", mode="min")

    def corrupt(self, inputs: jax.Array, rng: Key) -> jax.Array:
        """Returns what the model sees of the inputs. Override it for other corruptions.

        Args:
            inputs: what is to be reconstructed, `[batch, ...]`.
            rng: a key of this step's own; in evaluation always the same one.

        Returns:
            The inputs with Gaussian noise of standard deviation `noise`, unclipped.
        """
        noise = self.config.noise
        if noise == 0:
            return inputs
        return inputs + noise * jax.random.normal(rng, inputs.shape, inputs.dtype)

    def loss_fn(self, params: Params, batch: Batch, ctx: Context) -> Any:
        """Returns the mean squared error `[batch]`, and `psnr`, in decibels and at most 100.

        Raises:
            LossError: the inputs are no floats, or the model returns another shape.
        """
        inputs, *rest = self.model_inputs(batch)
        if not jnp.issubdtype(inputs.dtype, jnp.floating):
            raise LossError(
                f"An Autoencoder's inputs are floats; got {inputs.dtype}. Scale them in the "
                "loader, for example images / 255."
            )
        weight = weights_for(self.sample_weight(batch), inputs.shape, ctx)
        inputs = filled(inputs, weight)
        rest = filled(rest, weight)
        outputs = ctx.apply(params, self.corrupt(inputs, ctx.rng), *rest)
        if jnp.shape(outputs) != inputs.shape:
            raise LossError(
                "An Autoencoder's model returns the shape of its input; got inputs "
                f"{inputs.shape} and outputs {jnp.shape(outputs)}. Let the model end with "
                "x.reshape(inputs.shape)."
            )
        dtype = np.promote_types(outputs.dtype, np.float32)
        error = jnp.square(outputs.astype(dtype) - inputs.astype(dtype))
        loss = error.mean(tuple(range(1 if weight is None else weight.ndim, error.ndim)))
        if weight is None:
            return loss, {"psnr": _psnr(loss, self.config.data_range)}
        declared = Mean.per_example(loss, weight)
        of_each, weight = declared.values
        psnr = Mean.per_example(_psnr(of_each, self.config.data_range), weight)
        return declared, {"psnr": psnr}


def _psnr(error: jax.Array, data_range: float) -> jax.Array:
    """Returns the peak signal-to-noise ratio; a perfect example must not make the mean infinite."""
    smallest = 10 ** (-_LARGEST_PSNR / 10)
    return -10 * jnp.log10(jnp.maximum(error / data_range**2, smallest))


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)

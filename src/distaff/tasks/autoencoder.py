"""Autoencoding: models that reconstruct their inputs, optionally from a corrupted copy."""

from __future__ import annotations

import dataclasses
import math
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.config.checks import is_zero
from distaff.core.config.options import traced
from distaff.core.typing import Batch, Key, Params
from distaff.errors import ConfigError, LossError
from distaff.metrics import Mean, filled
from distaff.metrics.monitor import Monitor
from distaff.step.context import Context
from distaff.tasks.weighing import WeighingTask, weights_for
from distaff.trainer.config import TrainerConfig

_LARGEST_PSNR = 100.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(TrainerConfig):
    """The options of an `Autoencoder`, in addition to `TrainerConfig`.

    Args:
        noise: standard deviation of the Gaussian noise added to the model's inputs but not to the
            targets; 0 to disable.
        data_range: difference between the largest and the smallest possible input, for `psnr`.

    Raises:
        ConfigError: an option is out of its range.
    """

    noise: float = traced(0.0)
    data_range: float = traced(1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _is_finite(self.noise) or self.noise < 0:
            raise ConfigError(
                f"noise, a standard deviation, must be a finite number >= 0; got {self.noise!r}."
            )
        if not _is_finite(self.data_range) or self.data_range <= 0:
            raise ConfigError(f"data_range must be a finite number > 0; got {self.data_range!r}.")


class Autoencoder(WeighingTask):
    """Trains a model that reconstructs its input, `[batch, ...]`, by mean squared error.

    With `noise` it is a denoising autoencoder (P. Vincent et al., Extracting and Composing Robust
    Features with Denoising Autoencoders, ICML 2008): the model gets corrupted inputs, in validation
    and test too, and its outputs are compared with the clean ones. Evaluation always uses the same
    noise, so that results are comparable. Weights, `sample_weight` or `weight`, or the third item
    of a tuple, weight the loss and metrics: `[batch]`, or with more leading axes of the inputs. The
    best model is the one with the lowest `val/loss`. `predict` returns reconstructions of the
    uncorrupted inputs.

    Args:
        model: the model, as for `TrainerModule`, whose other arguments apply too. It reconstructs
            the first item that `model_inputs` returns; further items are passed on.
        **options: options of `AutoencoderConfig`, such as `noise=0.3`.
    """

    Config = AutoencoderConfig
    config: AutoencoderConfig
    monitor = Monitor("val/loss", mode="min")

    def corrupt(self, inputs: jax.Array, rng: Key) -> jax.Array:
        """Returns the corrupted inputs. Override it for other corruptions.

        Args:
            inputs: the clean inputs, `[batch, ...]`.
            rng: key of this step; the same one in every evaluation.

        Returns:
            The inputs with Gaussian noise of standard deviation `noise`, unclipped.
        """
        noise = self.config.noise
        if is_zero(noise):
            return inputs
        return inputs + noise * jax.random.normal(rng, inputs.shape, inputs.dtype)

    def loss_fn(self, params: Params, batch: Batch, ctx: Context) -> Any:
        """Returns the mean squared error `[batch]`, and `psnr`, in decibels and at most 100.

        Raises:
            LossError: the inputs are not floats, or the model returns another shape.
        """
        inputs, *rest = self.model_inputs(batch)
        if not jnp.issubdtype(inputs.dtype, jnp.floating):
            raise LossError(
                f"An Autoencoder's inputs must be floats; got {inputs.dtype}. Scale them in the "
                "loader, for example images / 255."
            )
        weight = weights_for(self.sample_weight(batch), inputs.shape, ctx)
        inputs, rest = filled(inputs, weight), filled(rest, weight)
        outputs = ctx.apply(params, self.corrupt(inputs, ctx.rng), *rest)
        if jnp.shape(outputs) != inputs.shape:
            raise LossError(
                "An Autoencoder's model must return the shape of its input; got inputs "
                f"{inputs.shape} and outputs {jnp.shape(outputs)}. End the model with "
                "x.reshape(inputs.shape)."
            )
        dtype = np.promote_types(outputs.dtype, np.float32)
        error = jnp.square(outputs.astype(dtype) - inputs.astype(dtype))
        loss = error.mean(tuple(range(1 if weight is None else weight.ndim, error.ndim)))
        extra = self.extra_metrics(outputs.astype(dtype), batch, ctx)
        if weight is None:
            return loss, {"psnr": _psnr(loss, self.config.data_range), **extra}
        mean_loss = Mean.per_example(loss, weight)
        loss_per_example, weight = mean_loss.values
        psnr = _psnr(loss_per_example, self.config.data_range)
        return mean_loss, {"psnr": Mean.per_example(psnr, weight), **extra}


def _psnr(error: jax.Array, data_range: float) -> jax.Array:
    """Returns the peak signal-to-noise ratio, bounded so that its mean stays finite."""
    smallest = 10 ** (-_LARGEST_PSNR / 10)
    return -10 * jnp.log10(jnp.maximum(error / data_range**2, smallest))


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)

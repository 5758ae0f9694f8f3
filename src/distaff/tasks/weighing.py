"""Sample weights: the weight of each example, or value, in a task's loss and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.typing import Batch
from distaff.data.entry import named
from distaff.errors import BatchError, ConfigError, LossError, leaf_name
from distaff.metrics.accumulators import aligned, floating
from distaff.step.context import Context
from distaff.step.state import TrainState
from distaff.trainer.module import TrainerModule

_NAMES = ("sample_weight", "sample_weights", "weight", "weights")
_PLACE = 2
_TOKENS = "Pad with a token that the model has."
_ADVICE = "Use the weight 0 to ignore an example."


class WeighingTask(TrainerModule):
    """A task whose batches may hold a weight for each example.

    Weights are the entry `sample_weight`, `sample_weights`, `weight` or `weights` of a dict or
    dataclass, or the third item of a tuple, `(input, label, weight)`.
    """

    def extra_metrics(self, outputs: Any, batch: Batch, ctx: Context) -> Mapping[str, Any]:
        """Returns further metrics of a batch by name; none by default. Override it.

        Args:
            outputs: what the model returned for the batch, in float32 or wider: logits `[batch,
                classes]` of a classifier.
            batch: the batch. Weights are not applied: pass `self.sample_weight(batch)` to a metric.
            ctx: context of the step; `ctx.train` says whether it is one of training.
        """
        return {}

    def num_outputs(self, batch: Batch) -> int | None:
        """Returns the length of the last axis of the model's output: its classes, or tokens.

        Args:
            batch: a batch, of which only shapes are used.

        Returns:
            None if the model has no parameters yet.
        """
        if self.state is None:
            return None
        here = self._workspace

        def forward(state: TrainState, batch: Batch) -> Any:
            return Context(state, train=False).apply(state.params, *self.model_inputs(batch))

        program = here.program("forward", forward)
        return here.execution.shapes(program, self.evaluation_state(), batch).shape[-1]

    def checked_inputs(self, batch: Batch, ctx: Context) -> tuple[Any, ...]:
        """Returns the model's inputs; checks that tokens among them are not negative.

        A token that is too large becomes NaN in the model, but -1 is read as the last one.
        """
        inputs = self.model_inputs(batch)
        tokens = named(batch).get("tokens")
        is_input = tokens is not None and any(each is tokens for each in inputs)
        if is_input and jnp.issubdtype(tokens.dtype, jnp.integer):
            what = with_entry_name("token", tokens, batch)
            ctx.check_range(f"A {what} is an index, at least 0", tokens, 0, advice=_TOKENS)
        return inputs

    def sample_weight(self, batch: Batch) -> Any:
        """Returns the weights of a batch, `[batch]`; None for equal weights.

        Override it for other batches, or to return None.

        Raises:
            BatchError: the third item of a tuple is not an array of floats or bools.
        """
        if isinstance(batch, tuple | list) and not hasattr(batch, "_fields"):
            return _tuple_weight(batch[_PLACE]) if len(batch) > _PLACE else None
        entries = named(batch)
        return next((entries[name] for name in _NAMES if entries.get(name) is not None), None)


def weights_for(
    weight: Any, shape: tuple[int, ...], ctx: Context, *, what: str = "sample weight"
) -> jax.Array | None:
    """Converts weights to floats and checks them in every batch.

    Args:
        weight: bool, int or float, with the leading axes of `shape`; None for equal weights.
        shape: shape of the weighted values, `[batch, ...]`.
        ctx: context of the step.
        what: name of the weights in errors.

    Raises:
        LossError: they have another shape.
    """
    if weight is None:
        return None
    weight = jnp.asarray(weight)
    if weight.ndim == 0 or weight.shape != shape[: weight.ndim]:
        whole = f" or {shape}" if len(shape) > 1 else ""
        raise LossError(
            f"A {what} must have one number for each example, or one for each value: shape "
            f"{shape[:1]}{whole}; got {weight.shape}. Reshape it in the loader, or override "
            "sample_weight(self, batch)."
        )
    check_weights(what, weight, ctx)
    return floating(weight)


def without_missing(targets: jax.Array, weight: jax.Array | None) -> jax.Array:
    """Returns a weight for each target, 0 for NaN."""
    known = ~jnp.isnan(targets)
    if weight is None:
        return known.astype(jnp.float32)
    return jnp.where(known, aligned(weight, targets), 0)


def with_entry_name(what: str, leaf: Any, batch: Batch) -> str:
    """Appends the name of a leaf of a batch: `"label ('y')"`."""
    for path, other in jax.tree.leaves_with_path(batch):
        if other is leaf and path:
            return f"{what} ({leaf_name(path)!r})"
    return what


def check_weights(what: str, weight: jax.Array, ctx: Context) -> None:
    """Checks that the weights of every batch are finite and not negative."""
    ctx.check_range(f"A {what} is a finite number, at least 0", weight, 0, advice=_ADVICE)


def ignored_index(name: str, value: Any) -> int:
    """Checks that an option is a 32-bit integer.

    Raises:
        ConfigError: it is not.
    """
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not (is_whole and abs(int(value)) < 2**31):
        raise ConfigError(f"{name} must be a 32-bit integer, such as -100, or None; got {value!r}.")
    return int(value)


def _tuple_weight(item: Any) -> Any:
    dtype = getattr(item, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jnp.floating) or dtype == np.bool_):
        raise BatchError(
            "The third item of a tuple (input, label, weight) must be the weight of each example, "
            f"float or bool [batch]; got {dtype or type(item).__name__}. If it is one, cast it; if "
            "not, yield a dict, or override sample_weight(self, batch) to return None."
        )
    return item

"""The guard: detects bad steps inside the program, and skips them if asked to.

A bad step makes the loss or the state NaN or infinite, or its loss is a spike. The guard reports
as a metric, so it needs no extra transfer from the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from distaff.core.config.options import Options, at_least, one_of, option, positive
from distaff.core.typing import Batch, PyTree
from distaff.errors import MetricError
from distaff.metrics import Mean, Metric, Sum
from distaff.metrics.accumulators import pytree
from distaff.step.finite import new_bad
from distaff.step.normalise import StepFn
from distaff.step.outliers import Losses, is_spike, no_losses, remembered
from distaff.step.state import TrainState

BadNumbersPolicy: TypeAlias = Literal["raise", "skip", "rollback"]
SpikePolicy: TypeAlias = Literal["ignore", "raise", "skip", "rollback"]

FLAGS = "guard"
"""The name of the `Flags` among the metrics of a guarded step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoveryOptions(Options):
    """What to do about bad steps."""

    on_bad_numbers: BadNumbersPolicy = option(
        "raise",
        """What to do when the loss or the state becomes NaN or infinite: "raise" ends the run with
        `NonFiniteError`, which reports the origin of the first bad number; "skip" keeps the state
        from before that step; "rollback" restores the last checkpoint and skips the batches around
        that step.""",
        check=one_of(BadNumbersPolicy),
        resume="same run",
    )
    on_loss_spike: SpikePolicy = option(
        "ignore",
        """What to do when a loss is far above the losses before it; "ignore" disables the
        check.""",
        check=one_of(SpikePolicy),
        resume="same run",
    )
    spike_threshold: float = option(
        8.0,
        """Number of standard deviations, robustly estimated, above the median of the last 128
        losses from which a loss is a spike.""",
        check=positive,
        resume="same run",
    )
    max_skips: int = option(
        10,
        "Maximum number of consecutive skipped steps, and of rollbacks per run.",
        check=at_least(1),
        resume="same run",
    )


@pytree
class Flags(Sum):
    """Counts of bad steps, float32 `[4]`, in the order of `names`.

    `bad` and `spiked` count bad steps that were not skipped.
    """

    names: ClassVar[tuple[str, ...]] = ("bad", "spiked", "skipped", "spikes")


class Guard(NamedTuple):
    """The guard's own state.

    Attributes:
        losses: the last losses; None if spikes are not checked.
        in_a_row: number of consecutive skipped steps, int32.
    """

    losses: Losses | None
    in_a_row: jax.Array


def is_needed(config: RecoveryOptions) -> bool:
    """Returns whether steps need a guard; with the default policies the host checks the loss."""
    return config.on_bad_numbers != "raise" or config.on_loss_spike != "ignore"


def make_guard(config: RecoveryOptions) -> Guard | None:
    """Returns the guard's state before the first step; None if no guard is needed."""
    if not is_needed(config):
        return None
    losses = None if config.on_loss_spike == "ignore" else no_losses()
    return Guard(losses, jnp.int32(0))


def form_of(guard: Guard | None) -> str | None:
    """Returns the kind of a guard's state, so that a checkpoint of another kind is not loaded."""
    if guard is None:
        return None
    return "steps" if guard.losses is None else "losses"


def shown(metrics: Mapping[str, Metric], config: RecoveryOptions) -> dict[str, Metric]:
    """Returns metrics with the flags replaced by the counts that the policies ask for."""
    rest = {name: metric for name, metric in metrics.items() if not isinstance(metric, Flags)}
    if len(rest) == len(metrics):
        return rest
    counts = dict(zip(Flags.names, metrics[FLAGS].compute(), strict=True))
    if "skip" in (config.on_bad_numbers, config.on_loss_spike):
        rest["skipped"] = Sum(counts["skipped"])
    if config.on_loss_spike != "ignore":
        rest["spikes"] = Sum(counts["spikes"])
    return rest


def guarded(step: StepFn, config: RecoveryOptions) -> StepFn:
    """Wraps a step of `measured` in the guard that the options ask for.

    A skipped step increments `state.step`, leaves the rest of the state unchanged, and has empty
    metrics. After `max_skips` consecutive skips the next bad step is not skipped.

    Args:
        step: a step whose state has a member `guard` from `make_guard`.
        config: the recovery options.
    """
    if not is_needed(config):
        return step

    def guarded_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Metric]]:
        after, metrics = step(state, batch)
        loss, guard = _loss(metrics, needed=config.on_loss_spike != "ignore"), state.guard
        is_bad = new_bad(state, after) | ~jnp.isfinite(jnp.where(_is_known(metrics), loss, 0))
        losses, spikes = guard.losses, jnp.bool_(False)
        if losses is not None:
            spikes = is_spike(losses, loss)
            losses = remembered(losses, loss, config.spike_threshold)
        is_skipped = (is_bad & (config.on_bad_numbers == "skip")) | (
            spikes & (config.on_loss_spike == "skip")
        )
        in_a_row = jnp.where(is_skipped, guard.in_a_row + 1, 0)
        if "skip" in (config.on_bad_numbers, config.on_loss_spike):
            is_skipped &= in_a_row <= config.max_skips
            after = _select(is_skipped, state.replace(step=after.step), after)
            # Range checks are kept, so that an invalid batch is reported even if it is skipped.
            empty = {n: x.empty_like() if x.is_result else x for n, x in metrics.items()}
            metrics = _select(is_skipped, empty, metrics)
        # After `max_skips` in a row, a spike is the new level of the loss.
        spiked = spikes & (config.on_loss_spike != "skip")
        flags = jnp.stack([is_bad & ~is_skipped, spiked & ~is_skipped, is_skipped, spikes])
        metrics = {**metrics, FLAGS: Flags(flags.astype(jnp.float32))}
        return after.replace(guard=Guard(losses, in_a_row)), metrics

    return guarded_step


def _loss(metrics: Mapping[str, Metric], *, needed: bool) -> jax.Array:
    taken = {FLAGS, "spikes", "skipped"} & metrics.keys()
    if taken:
        raise MetricError(
            f"The metric names {sorted(taken)} are reserved for the counts of on_bad_numbers and "
            "on_loss_spike. Rename these metrics."
        )
    if "loss" not in metrics and needed:
        raise MetricError(
            "on_loss_spike needs a metric called 'loss'; the training step returns "
            f"{sorted(metrics)}. Return one, or pass on_loss_spike='ignore'."
        )
    return jnp.float32(jnp.mean(metrics["loss"].compute()) if "loss" in metrics else 0.0)


def _is_known(metrics: Mapping[str, Metric]) -> jax.Array:
    """Returns whether the loss has any weight; without, its value is undefined."""
    loss = metrics.get("loss")
    return jnp.any(loss.weight != 0) if isinstance(loss, Mean) else jnp.bool_(True)


def _select(condition: jax.Array, tree: PyTree, other: PyTree) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), tree, other)

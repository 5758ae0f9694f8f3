"""The guard: sees bad steps inside the program, and leaves them out where it is told to.

A bad step is one that makes a number of the state, or the loss, NaN or infinite; or whose loss is a
spike. Nothing is fetched for it: what it sees is a row of metrics like any other.
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
"""The name under which a guarded step returns its `Flags`, beside its metrics."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoveryOptions(Options):
    """What to do about bad steps."""

    on_bad_numbers: BadNumbersPolicy = option(
        "raise",
        """What to do when the loss or the state becomes NaN or infinite: "raise" ends the run with
        `NonFiniteError`, which says where the first bad number came from; "skip" leaves the state
        as it was before that step; "rollback" returns to the last checkpoint, and skips the
        batches around that step.""",
        check=one_of(BadNumbersPolicy),
        resume="same run",
    )
    on_loss_spike: SpikePolicy = option(
        "ignore",
        """Likewise for a loss that stands out from those before it; by default nobody looks for
        one.""",
        check=one_of(SpikePolicy),
        resume="same run",
    )
    spike_threshold: float = option(
        8.0,
        """How many standard deviations above the median of the last 128 losses a spike is, by a
        robust estimate.""",
        check=positive,
        resume="same run",
    )
    max_skips: int = option(
        10,
        "How many steps in a row may be skipped, and how often a run may roll back.",
        check=at_least(1),
        resume="same run",
    )


@pytree
class Flags(Sum):
    """What the guard has seen of steps; in the order of these names, float32 `[4]`.

    `bad` and `spiked` are steps that are not to be trained on, and were not left out.
    """

    names: ClassVar[tuple[str, ...]] = ("bad", "spiked", "skipped", "spikes")


class Guard(NamedTuple):
    """What the guard remembers from one step to the next.

    Attributes:
        losses: the last ones; None where nobody looks for spikes.
        in_a_row: steps since the last one that was not to be left out, int32.
    """

    losses: Losses | None
    in_a_row: jax.Array


def is_needed(config: RecoveryOptions) -> bool:
    """Whether steps need a guard: where only the loss is watched, the host does that alone."""
    return config.on_bad_numbers != "raise" or config.on_loss_spike != "ignore"


def make_guard(config: RecoveryOptions) -> Guard | None:
    """Returns what a guard remembers before the first step; None where none is needed."""
    if not is_needed(config):
        return None
    losses = None if config.on_loss_spike == "ignore" else no_losses()
    return Guard(losses, jnp.int32(0))


def form_of(guard: Guard | None) -> str | None:
    """Returns in a word what a guard remembers, so that one of another form is not loaded."""
    if guard is None:
        return None
    return "steps" if guard.losses is None else "losses"


def shown(metrics: Mapping[str, Metric], config: RecoveryOptions) -> dict[str, Metric]:
    """Returns metrics with what their flags count as metrics of their own, under policies."""
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
    """Wraps a step, as `measured` gives it, in the guard that the options ask for.

    Where a step is left out, the state stays as it was but for `step`, which counts it, and its
    metrics count nothing. After `max_skips` in a row the next one is no longer left out.

    Args:
        step: its state has a member `guard`, as `make_guard` makes it.
        config: `on_bad_numbers`, `on_loss_spike`, `spike_threshold` and `max_skips` are read.
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
            after = _chosen(is_skipped, state.replace(step=after.step), after)
            # A limit is kept: a step that its own batch has spoiled is not to pass in silence.
            empty = {n: x.empty_like() if x.is_result else x for n, x in metrics.items()}
            metrics = _chosen(is_skipped, empty, metrics)
        # A spike that is not left out, after so many in a row, is a new level of the loss.
        spiked = spikes & (config.on_loss_spike != "skip")
        flags = jnp.stack([is_bad & ~is_skipped, spiked & ~is_skipped, is_skipped, spikes])
        metrics = {**metrics, FLAGS: Flags(flags.astype(jnp.float32))}
        return after.replace(guard=Guard(losses, in_a_row)), metrics

    return guarded_step


def _loss(metrics: Mapping[str, Metric], *, needed: bool) -> jax.Array:
    taken = {FLAGS, "spikes", "skipped"} & metrics.keys()
    if taken:
        raise MetricError(
            f"The names {sorted(taken)} are taken by what on_bad_numbers and on_loss_spike count; "
            "rename these metrics."
        )
    if "loss" not in metrics and needed:
        raise MetricError(
            "on_loss_spike looks at the metric called 'loss'; the training step has none among "
            f"{sorted(metrics)}. Return one, or pass on_loss_spike='ignore'."
        )
    return jnp.float32(jnp.mean(metrics["loss"].compute()) if "loss" in metrics else 0.0)


def _is_known(metrics: Mapping[str, Metric]) -> jax.Array:
    """Returns whether a loss has a weight: without, there was nothing to learn from."""
    loss = metrics.get("loss")
    return jnp.any(loss.weight != 0) if isinstance(loss, Mean) else jnp.bool_(True)


def _chosen(condition: jax.Array, tree: PyTree, other: PyTree) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), tree, other)

"""Learning-rate schedules over the real number of optimizer steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from distaff.core.typing import Schedule
from distaff.errors import ConfigError
from distaff.optim.config import OptimizerConfig

_LONGEST = 2**30
"""The maximum number of steps that a schedule divides by exactly."""

_ENDLESS = {"constant", "inverse_sqrt"}
_ONE_CYCLE_RISE = 25.0
_ONE_CYCLE_RISE_SHARE = 0.3


def make_schedule(config: OptimizerConfig, total_steps: int | None) -> Schedule:
    """Returns the learning rate as a function of the optimizer step.

    The rate rises linearly from 0 over the first `warmup_steps` steps, then follows the schedule.
    With peak `p`, end `e` (`p * end_fraction`) and `n` steps left:

    * constant: `p`.
    * cosine: from `p` to `e` along half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983).
    * linear: from `p` to `e` along a line.
    * exponential: from `p` to `e` by the same factor at each step.
    * inverse_sqrt: `p * sqrt(w / max(step, w))` with `w = max(warmup_steps, 1)` and `step` counted
      from the start of the run (Vaswani et al. 2017, arXiv:1706.03762, section 5.3).
    * wsd, warm-up-stable-decay: `p` until the last `d` updates, then to `e` (Hägele et al. 2024,
      arXiv:2405.18392). With `t` from 0 to 1 over these, the rate is `p - (p - e) * sqrt(t)` for
      the decay_shape 1-sqrt, and `p - (p - e) * t` for linear. If decay_steps is a fraction, it is
      rounded to `d` updates, one at least, and `d` is at most `n`.
    * one_cycle: from `p / 25` to `p` in 0.3 `n` steps, one at least, then to `e`, both along half
      a cosine (Smith & Topin 2018, arXiv:1708.07120). A single step is at `p`.

    The end `e` is the rate after `n` steps; the last step, number `n - 1`, is slightly above it.

    Args:
        config: the schedule's name, peak, end and warm-up.
        total_steps: optimizer steps of the whole run; None if unknown.

    Returns:
        A function of the number of completed steps, an int or an array of shape `[]`.

    Raises:
        ConfigError: the warm-up is not shorter than the run, or with the decay longer than it; or
            the schedule needs the length of the run and it is unknown.
    """
    if total_steps is None and config.schedule not in _ENDLESS:
        raise ConfigError(
            f"The schedule {config.schedule!r} needs the number of steps of the run, which is not "
            "known: the loader has no length, or the run ends after a time. Pass steps_per_epoch "
            "to train_model, or a number of steps as num_epochs, or use schedule='constant' or "
            "'inverse_sqrt'."
        )
    if total_steps is not None and total_steps <= config.warmup_steps:
        raise ConfigError(
            f"The warm-up must be shorter than the run: warmup_steps is {config.warmup_steps}, but "
            f"the run has {total_steps} optimizer steps. Lower warmup_steps or train longer."
        )
    num_decay = 0 if total_steps is None else _num_decay(config, total_steps)
    after_warmup = _after_warmup(config, (total_steps or 0) - config.warmup_steps, num_decay)
    if config.warmup_steps == 0:
        return after_warmup
    start = config.learning_rate
    if config.schedule == "one_cycle":
        start /= _ONE_CYCLE_RISE
    warmup = optax.linear_schedule(0.0, start, config.warmup_steps)
    return optax.join_schedules([warmup, after_warmup], [config.warmup_steps])


def _num_decay(config: OptimizerConfig, total_steps: int) -> int:
    """Returns the number of updates over which wsd lowers the rate."""
    steps, room = config.decay_steps, total_steps - config.warmup_steps
    if isinstance(steps, float):
        return min(max(round(steps * total_steps), 1), room)
    if config.schedule == "wsd" and steps > room:
        raise ConfigError(
            f"The warm-up and the decay must fit into the run: warmup_steps is "
            f"{config.warmup_steps} and decay_steps {steps}, but the run has {total_steps} "
            "optimizer steps. Lower one of them, or give decay_steps as a fraction such as 0.2."
        )
    return steps


def _after_warmup(config: OptimizerConfig, num_steps: int, num_decay: int) -> Schedule:
    if num_steps > _LONGEST:  # Steps are counted in int32.
        schedule = _after_warmup(config, _LONGEST, max(num_decay * _LONGEST // num_steps, 1))
        return lambda step: schedule(jnp.asarray(step, jnp.float32) * (_LONGEST / num_steps))
    peak, end_fraction = config.learning_rate, config.end_fraction
    match config.schedule:
        case "constant":
            return optax.constant_schedule(peak)
        case "cosine":
            return optax.cosine_decay_schedule(peak, num_steps, alpha=end_fraction)
        case "linear":
            return optax.linear_schedule(peak, peak * end_fraction, num_steps)
        case "exponential":
            return optax.exponential_decay(peak, num_steps, decay_rate=end_fraction)
        case "inverse_sqrt":
            return _inverse_sqrt_schedule(peak, config.warmup_steps)
        case "wsd":
            return _stable_then_decay(config, num_steps, num_decay)
        case "one_cycle":
            # Even a run of a few steps rises first; only a single step starts at the peak.
            summit = max(int(_ONE_CYCLE_RISE_SHARE * num_steps), min(num_steps - 1, 1))
            return optax.piecewise_interpolate_schedule(
                "cosine", peak / _ONE_CYCLE_RISE, {summit: _ONE_CYCLE_RISE, num_steps: end_fraction}
            )


def _stable_then_decay(config: OptimizerConfig, num_steps: int, num_decay: int) -> Schedule:
    peak, end, begin = config.learning_rate, config.end_fraction, num_steps - num_decay
    if config.decay_shape == "linear":
        return optax.linear_schedule(peak, peak * end, num_decay, transition_begin=begin)

    def schedule(steps_after_warmup: jax.typing.ArrayLike) -> jax.Array:
        progress = jnp.clip((jnp.asarray(steps_after_warmup) - begin) / num_decay, 0.0, 1.0)
        return peak * (1 - (1 - end) * jnp.sqrt(progress))

    return schedule


def _inverse_sqrt_schedule(peak: float, warmup_steps: int) -> Schedule:
    knee = max(warmup_steps, 1)

    def schedule(steps_after_warmup: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.maximum(steps_after_warmup + warmup_steps, knee)
        return peak * jnp.sqrt(knee / step)

    return schedule

"""Norms of gradients, updates and parameters, logged with the metrics of a step."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distaff.core.config.options import Options, option
from distaff.core.typing import Params, PyTree
from distaff.errors import ConfigError, LossError, leaf_name
from distaff.metrics import Mean
from distaff.optim.transforms.masks import check_patterns

GRAD_NORM, UPDATE_NORM, PARAM_NORM = "grad_norm", "update_norm", "param_norm"

_SMALL = 2**14
"""Most elements of an array that is joined with others for its norm."""


def _log_norms(name: str, value: Any) -> bool | tuple[str, ...]:
    if isinstance(value, bool):
        return value
    patterns = (value,) if isinstance(value, str) else value
    is_tuple = isinstance(patterns, list | tuple) and len(patterns) > 0
    if not is_tuple or not all(isinstance(each, str) and each for each in patterns):
        raise ConfigError(
            f"{name} must be True, False, or patterns for the paths of parameters, such as "
            f'("encoder/*", "head/*"); got {value!r}.'
        )
    return tuple(patterns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormOptions(Options):
    """Which norms a training step logs."""

    log_norms: bool | tuple[str, ...] = option(
        False,
        """Log the global norms of gradients, updates and parameters, as `step/grad_norm`,
        `step/update_norm` and `step/param_norm`. Shell patterns for the paths of parameters, such
        as ("encoder/*", "head/*"), also log the norms of each group, as
        `step/grad_norm/encoder`.""",
        check=_log_norms,
    )


class Norms:
    """Computes the norms of a step. Pass it to `train_step(loss_fn, norms=Norms())`.

    Args:
        patterns: shell patterns (`fnmatch.fnmatchcase`) for the paths of parameters, such as
            `"encoder/*"`; the norms of each group are logged as well.
    """

    def __init__(self, patterns: Iterable[str] = ()) -> None:
        self._groups = {pattern.rstrip("*").rstrip("/") or pattern: pattern for pattern in patterns}

    def __call__(self, grads: Params, before: Params, after: Params) -> dict[str, Mean]:
        """Returns the norms of a step by name, each float32 `[]`, averaged over a log window.

        Args:
            grads: gradients of the loss, before clipping.
            before: parameters before the update.
            after: parameters after it. A step without an update, as under gradient accumulation,
                does not count in the average of `update_norm`.

        Raises:
            ConfigError: a pattern matches no parameter.
        """
        check_patterns({"log_norms": tuple(self._groups.values())}, before)
        updates = jax.tree.map(lambda new, old: _wide(new) - _wide(old), after, before)
        norms = {}
        for suffix, pattern in {"": "*", **{f"/{n}": p for n, p in self._groups.items()}}.items():
            update = _norm(updates, pattern)
            norms[GRAD_NORM + suffix] = _mean(_norm(grads, pattern))
            norms[UPDATE_NORM + suffix] = Mean(update, jnp.float32(update != 0))
            norms[PARAM_NORM + suffix] = _mean(_norm(after, pattern))
        return norms


def norms_of(options: NormOptions) -> Norms | None:
    """Returns the norms that the options ask for; None for none."""
    if options.log_norms is False:
        return None
    return Norms(() if options.log_norms is True else options.log_norms)


def with_norms(metrics: Mapping[str, Any], norms: Mapping[str, Mean]) -> dict[str, Any]:
    """Returns metrics together with norms.

    Raises:
        LossError: a metric has the name of a norm.
    """
    if taken := sorted(metrics.keys() & norms.keys()):
        raise LossError(
            f"The metric names {taken} are reserved for the norms of log_norms. Rename these "
            "metrics."
        )
    return {**metrics, **norms}


def check_norms(options: NormOptions, names: Iterable[str], owner: str) -> None:
    """Checks that the step of a trainer returns the norms that its options ask for.

    Raises:
        ConfigError: it does not.
    """
    if options.log_norms is not False and GRAD_NORM not in names:
        raise ConfigError(
            f"log_norms={options.log_norms!r} needs a training step that returns the metric "
            f"'{GRAD_NORM}', and the step of {owner} returns {sorted(names)}. Build it with "
            "train_step(loss_fn, norms=Norms()), or remove log_norms."
        )


def is_norm(name: str) -> bool:
    """Returns whether a logged name is that of a norm, such as `train/grad_norm/encoder`."""
    return any(part in (GRAD_NORM, UPDATE_NORM, PARAM_NORM) for part in name.split("/"))


def _norm(tree: PyTree, pattern: str) -> jax.Array:
    """Returns the Euclidean norm over the leaves whose path matches, float32 `[]`."""
    found = [
        jnp.abs(_wide(leaf))
        for path, leaf in jax.tree.leaves_with_path(tree)
        if fnmatch.fnmatchcase(leaf_name(path), pattern)
    ]
    squares = [jnp.sum(jnp.square(each)) for each in _joined(found)]
    return jnp.sqrt(sum(squares, jnp.zeros([], jnp.float32)))


def _joined(arrays: list[jax.Array]) -> list[jax.Array]:
    """Returns arrays with the small ones joined, on the CPU, where each sum is a kernel."""
    if jax.default_backend() != "cpu":
        return arrays
    small = [each.ravel() for each in arrays if each.size <= _SMALL and each.dtype == jnp.float32]
    others = [each for each in arrays if each.size > _SMALL or each.dtype != jnp.float32]
    return [*others, jnp.concatenate(small)] if small else others


def _wide(leaf: jax.Array) -> jax.Array:
    """Returns an array in at least single precision."""
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _mean(norm: jax.Array) -> Mean:
    return Mean(jnp.float32(norm), jnp.float32(1))

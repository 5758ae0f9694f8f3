"""Checks that a training step computes parts of the model again in its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

from distaff.errors import ConfigError
from distaff.models import RematConfig

_NAMES = ("remat", "remat2", "checkpoint")


def check_recomputed(
    step: Callable[..., Any], state: Any, batch: Any, remat: RematConfig | None
) -> None:
    """Checks that rematerialization has an effect on a training step.

    Raises:
        ConfigError: it has none.
    """
    if remat is None or _is_recomputed(jax.make_jaxpr(step)(state, batch)):
        return
    shown = repr(remat.policy) if not remat.patterns else ", ".join(map(repr, remat.patterns))
    raise ConfigError(
        f"remat has no effect: the training step computes nothing again for {shown}. It applies to "
        "ctx.apply, and to state.apply_fn as init_model sets it; a pattern applies to modules that "
        "are called as module(x), not by another method. Run the model by one of these, or pass "
        "remat=None."
    )


def _is_recomputed(jaxpr: Any) -> bool:
    return any(
        equation.primitive.name in _NAMES
        or any(map(_is_recomputed, jaxprs_in_params(equation.params)))
        for equation in jaxpr.eqns
    )

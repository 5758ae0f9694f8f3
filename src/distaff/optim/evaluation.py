"""Parameters for evaluation, for optimizers that train other ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from distaff.core.typing import Params, PyTree
from distaff.errors import ConfigError
from distaff.optim.transforms.extra_args import is_masked, unmask


def evaluation_params(opt_state: PyTree, params: Params) -> Params:
    """Returns the parameters to evaluate, use and save a model with.

    Some optimizers train other parameters: `schedule_free` computes gradients near an average and
    evaluates at it (Defazio et al. 2024, arXiv:2405.15682); `sam` without `opaque_mode` leaves the
    parameters at a perturbed point after every other step (Foret et al. 2021, arXiv:2010.01412).
    Their states are found within any chain, mask, partition, accumulation or other wrapper.

    Args:
        opt_state: the state of any Optax optimizer, or None.
        params: the parameters that the optimizer trains.

    Returns:
        A pytree with the shapes and dtypes of `params`; `params` itself if nothing differs.

    Raises:
        ConfigError: the optimizer sees the parameters in another structure (`optax.flatten`).
    """
    for state in _with_rule(opt_state):
        try:
            params = _RULES[type(state)](state, params)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                "An optimizer that evaluates with other parameters than it trains must see them "
                f"in the model's structure, but the parameters in {type(state).__name__} have "
                "another. Remove the wrapper that changes it, such as optax.flatten."
            ) from error
    return params


def has_evaluation_params(opt_state: PyTree) -> bool:
    """Returns whether `evaluation_params` may differ from the parameters; reads types only."""
    return next(_with_rule(opt_state), None) is not None


def _with_rule(opt_state: PyTree) -> Iterator[Any]:
    return filter(_has_rule, jax.tree.leaves(opt_state, is_leaf=_has_rule))


def _has_rule(node: Any) -> bool:
    is_opaque = isinstance(node, optax.contrib.SAMState) and node.cache is None
    return type(node) in _RULES and not is_opaque


def _averaged(state: optax.contrib.ScheduleFreeState, params: Params) -> Params:
    shown = jax.tree.map(
        lambda own, full: own if is_masked(own) else full, state.z, params, is_leaf=is_masked
    )
    averaged = unmask(optax.contrib.schedule_free_eval_params(state, shown), params)
    # The state may have another precision than the parameters.
    return jax.tree.map(lambda own, full: jnp.asarray(own, full.dtype), averaged, params)


def _unperturbed(state: optax.contrib.SAMState, params: Params) -> Params:
    is_perturbed = state.steps_since_sync > 0
    params = jax.tree.map(
        lambda own, full: jnp.where(is_perturbed, own, full), unmask(state.cache, params), params
    )
    return evaluation_params(state.opt_state, params)


_RULES: dict[type, Callable[[Any, Params], Params]] = {
    optax.contrib.ScheduleFreeState: _averaged,
    optax.contrib.SAMState: _unperturbed,
}

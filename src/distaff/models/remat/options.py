"""The option `remat`: which parts of a model are computed again, and what is stored of them."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY
from typing import Any, Literal, TypeAlias, get_args

import jax

from distaff.core.config.argument import Argument
from distaff.core.config.options import Options, check_choice, option
from distaff.errors import ConfigError, nearest

PolicyName: TypeAlias = Literal[
    "nothing_saveable",
    "everything_saveable",
    "dots_saveable",
    "checkpoint_dots",
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots_with_no_batch_dims",
]
"""Names in `jax.checkpoint_policies` of policies without arguments."""

_POLICIES = get_args(PolicyName)


@dataclasses.dataclass(frozen=True)
class RematConfig:
    """Which parts of a model are computed again in the backward pass, and what is stored of them.

    Args:
        patterns: shell patterns for the paths of modules, such as `"Block_*"`. Each call of a
            matching module stores its inputs and what the policy says; a module inside a matching
            one belongs to it. Without patterns, the whole forward pass is one part.
        policy: name of a policy in `jax.checkpoint_policies`, such as `"dots_saveable"`, which
            stores the results of matrix products. None stores only the inputs.

    Raises:
        ConfigError: a value is unknown, or there is neither a pattern nor a policy.
    """

    patterns: tuple[str, ...] = ()
    _: KW_ONLY
    policy: PolicyName | None = None

    def __post_init__(self) -> None:
        given = (self.patterns,) if isinstance(self.patterns, str) else self.patterns
        if not isinstance(given, tuple | list) or not all(
            isinstance(each, str) and each for each in given
        ):
            raise ConfigError(
                "patterns of a RematConfig must be a pattern for the paths of modules, or a tuple "
                f"of them, such as ('Block_*',); got {self.patterns!r}."
            )
        object.__setattr__(self, "patterns", tuple(given))
        if self.policy is not None:
            check_choice("policy", self.policy, PolicyName)
        if not given and self.policy is None:
            raise ConfigError(
                "A RematConfig needs patterns for the paths of modules, a policy, or both; got "
                "neither. Write RematConfig('Block_*'), or RematConfig(policy='dots_saveable')."
            )

    def matches(self, path: str) -> bool:
        """Returns whether a module of this path matches a pattern; the model itself never does."""
        return path != "" and any(fnmatch.fnmatchcase(path, each) for each in self.patterns)

    @property
    def saveable(self) -> Callable[..., bool] | None:
        """The policy as `jax.checkpoint` takes it."""
        return None if self.policy is None else getattr(jax.checkpoint_policies, self.policy)

    def check(self, paths: Iterable[str], model: str) -> None:
        """Checks that each pattern matches a module.

        Args:
            paths: the paths of the modules.
            model: name of the model, for errors.

        Raises:
            ConfigError: a pattern matches none.
        """
        known = sorted({path for path in paths if path})
        unmatched = [x for x in self.patterns if not fnmatch.filter(known, x)]
        if not unmatched:
            return
        pattern = unmatched[0]
        found = f"{pattern!r} is not a policy, and matches no module of {model}"
        policies = f"Policies: {', '.join(map(repr, _POLICIES))}."
        if not known:
            raise ConfigError(
                f"A pattern of remat must match the path of a module, but {found}, which calls "
                "none that can be matched: functions have none, and nn.jit hides them. Pass a "
                f"policy for the whole forward pass instead. {policies}"
            )
        policy = difflib.get_close_matches(pattern, _POLICIES, n=1, cutoff=0.8)
        question = f"Did you mean the policy {policy[0]!r}? " if policy else ""
        modules = nearest(pattern, known)
        raise ConfigError(
            f"A pattern of remat must match the path of a module, but {found}. {question}"
            f"{modules} {policies}"
        )


def as_remat(name: str, value: Any) -> Any:
    """Checks that a value is a pattern, several, the name of a policy, or a `RematConfig`."""
    if value is None or isinstance(value, RematConfig):
        return value
    if callable(value):
        known = next((x for x in _POLICIES if getattr(jax.checkpoint_policies, x) is value), None)
        shown = repr(known or "dots_saveable")
        raise ConfigError(
            f"{name} takes a policy by its name, so that it can be recorded; got {value!r}. Write "
            f"{name}={shown}. Policies: {', '.join(map(repr, _POLICIES))}."
        )
    if isinstance(value, str) and value in _POLICIES:
        return value
    given = (value,) if isinstance(value, str) else value
    is_sequence = isinstance(given, tuple | list)
    if not is_sequence or not given or not all(isinstance(x, str) and x for x in given):
        raise ConfigError(
            f"{name} must be a pattern for the paths of modules such as 'Block_*', a tuple of "
            "patterns, the name of a policy, a distaff.RematConfig, or None; got "
            f"{value!r}. Policies: {', '.join(map(repr, _POLICIES))}."
        )
    for each in given:
        if each in _POLICIES:
            others = tuple(x for x in given if x != each)
            raise ConfigError(
                f"{each!r} in {name} is a policy, not a pattern. Write "
                f"{name}=RematConfig({others!r}, policy={each!r})."
            )
    return value if isinstance(value, str) else tuple(given)


def remat_of(value: str | tuple[str, ...] | RematConfig | None) -> RematConfig | None:
    """Returns the `RematConfig` of an option; None without rematerialization.

    Raises:
        ConfigError: it is not a value of the option.
    """
    value = as_remat("remat", value)
    if value is None or isinstance(value, RematConfig):
        return value
    if isinstance(value, str) and value in _POLICIES:
        return RematConfig(policy=value)
    return RematConfig(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RematOptions(Options):
    """What a model stores for the backward pass."""

    remat: Argument[str | tuple[str, ...] | RematConfig | None] = option(
        None,
        """Parts of the model that are computed again in the backward pass, to save memory: a shell
        pattern for the paths of modules such as "Block_*", or several; or the name of a policy in
        `jax.checkpoint_policies`, such as "dots_saveable", for the whole forward pass. A
        `RematConfig` combines both.""",
        check=as_remat,
        resume="same run",
    )

"""Calls of a model as Flax Linen has them: `model.apply({"params": params}, x)`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def applies_collections(apply: F) -> F:
    """Makes the method `apply` of a model take collections by name, too.

    Given `{"params": ..., "batch_stats": ...}`, it does what `TrainState.apply_fn` does: of Flax
    Linen `module.apply`, with its arguments and its result.
    """

    @functools.wraps(apply)
    def either(self: Any, variables: Any, *inputs: Any, **kwargs: Any) -> Any:
        if isinstance(variables, Mapping):
            return self.apply_fn(variables, *inputs, **kwargs)
        return apply(self, variables, *inputs, **kwargs)

    return either  # ty: ignore[invalid-explicit-return]


def initialises_by_keyword(init: F) -> F:
    """Makes the method `init` of a Linen model take what `module.init` does, and return that.

    A key for each random stream, or an argument by keyword, is what only a user passes.
    """

    @functools.wraps(init)
    def either(self: Any, key: Any, *inputs: Any, **kwargs: Any) -> Any:
        if kwargs or isinstance(key, Mapping):
            return self.module.init(key, *inputs, **kwargs)
        return init(self, key, *inputs)

    return either  # ty: ignore[invalid-explicit-return]

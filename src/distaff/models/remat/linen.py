"""Rematerialization of Flax Linen modules, whose parameters keep their names."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from distaff.models.remat.checkpointed import Results, split
from distaff.models.remat.options import RematConfig


class RematInterceptor:
    """An interceptor for `nn.intercept_methods` that runs calls of modules in `nn.remat`.

    `nn.remat` on a class would rename its modules, and with them the parameters.

    Args:
        remat: the modules; those inside a matching one run as a part of it.

    Attributes:
        called: paths of all modules that were called.
    """

    def __init__(self, remat: RematConfig) -> None:
        self.called: set[str] = set()
        self._remat = remat
        self._is_inside = False

    def __call__(self, call: Any, args: Any, kwargs: Mapping[str, Any], context: Any) -> Any:
        """Calls a method of a module, in `nn.remat` if it matches."""
        module = context.module
        if context.method_name != "__call__" or module.scope is None:
            return call(*args, **kwargs)
        path = "/".join(module.path)
        self.called.add(path)
        if self._is_inside or not self._remat.matches(path):
            return call(*args, **kwargs)
        self._is_inside = True
        try:
            return self._again(context.orig_method.func, module, args, kwargs)
        finally:
            self._is_inside = False

    def _again(self, method: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        dynamic, rebuild = split((args, dict(kwargs)), _is_dynamic)
        results = Results(type(module).__name__)

        @functools.wraps(method)
        def run(module: nn.Module, dynamic: Mapping[int, Any]) -> dict[int, jax.Array]:
            args, kwargs = rebuild(dynamic)
            with nn.override_named_call(True):
                return results.take(method(module, *args, **kwargs), dynamic)

        again: Any = nn.remat(run, policy=self._remat.saveable)
        # Otherwise the module's name would be in the scope of its operations twice.
        with nn.override_named_call(False):
            return results.rebuilt(again(module, dynamic), dynamic)


def _is_dynamic(leaf: Any) -> bool:
    # Linen passes modules and variables on to the inner scope; other leaves are constants.
    return isinstance(leaf, jax.Array | nn.Module | nn.Variable)

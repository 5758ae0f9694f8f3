"""A model whose forward pass is computed again, in parts, in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from distaff.core.typing import Key, PyTree
from distaff.errors import leaf_name
from distaff.models.adapter import Model, ModelWrapper, Variables, accepts_collections
from distaff.models.observed import Observed, observing
from distaff.models.remat.checkpointed import checkpointed
from distaff.models.remat.linen import RematInterceptor
from distaff.models.remat.options import RematConfig


class RematModel(ModelWrapper):
    """Runs the passes of a model with rematerialization. Names and values do not change.

    Args:
        inner: the model.
        remat: the parts that are computed again.

    Attributes:
        plain: the model without rematerialization.
    """

    def __init__(self, inner: Model, remat: RematConfig) -> None:
        super().__init__(reached(inner, remat))
        self.plain = inner
        self._remat = remat

    def observing(self, observed: Observed) -> RematModel:
        """Returns this model with its passes recorded."""
        return RematModel(observing(self.inner, observed), self._remat)

    @accepts_collections
    def apply(
        self, variables: Variables, *inputs: Any, train: bool, key: Key | None, **kwargs: Any
    ) -> tuple[Any, Variables]:
        """Runs the forward pass; see `Model.apply`.

        Raises:
            ConfigError: a pattern matches no module, or a module returns something else than a
                pytree of arrays.
        """

        def run(variables: Variables, *inputs: Any, key: Key | None, **kwargs: Any) -> Any:
            return self.inner.apply(variables, *inputs, train=train, key=key, **kwargs)

        collections = variables.by_collection()
        return self._run(run, collections, variables, *inputs, key=key, **kwargs)

    def forward(self, variables: Mapping[str, PyTree], *inputs: Any, **kwargs: Any) -> Any:
        """Runs the model's own forward function, given collections by name."""
        return self._run(self.inner.apply_fn, variables, variables, *inputs, **kwargs)

    def _run(
        self,
        function: Callable[..., Any],
        collections: Mapping[str, PyTree],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        model = type(self.module).__name__
        if not self._remat.patterns:
            return checkpointed(function, self._remat.saveable, model)(*args, **kwargs)
        interceptor = RematInterceptor(self._remat)
        with nn.intercept_methods(interceptor):
            outputs = function(*args, **kwargs)
        known = {"/".join(path) for path in _modules(self.inner)} or interceptor.called
        if interceptor.called:
            known = known | _parents(collections)  # Another method may call only some modules.
        self._remat.check(known, model)
        return outputs


def reached(model: Model, remat: RematConfig) -> Model:
    """Returns a model whose own modules are computed again, if its kind does that itself."""
    method = getattr(model, "rematerialized", None)
    return model if method is None else method(remat)


def _modules(model: Any) -> Mapping[tuple[str, ...], Any]:
    while not hasattr(model, "modules") and hasattr(model, "inner"):
        model = model.inner
    return model.modules() if hasattr(model, "modules") else {}


def _parents(collections: Mapping[str, PyTree]) -> set[str]:
    """Returns the paths of the modules that have variables."""
    found: set[str] = set()
    for path, _ in jax.tree.leaves_with_path(collections):
        names = leaf_name(path).split("/")[1:-1]
        found.update("/".join(names[:n]) for n in range(1, len(names) + 1))
    return found

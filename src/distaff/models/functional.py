"""Models as plain functions: a pair `(init, apply)`, or a forward function alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from distaff.core.typing import Key
from distaff.errors import ConfigError
from distaff.models.adapter import Adapter, LayerRow, Variables, accepts_collections
from distaff.models.flags import mode_flag, num_positional, parameters
from distaff.models.layers import Path, describe, flops, layer_rows, own_flops
from distaff.models.randomness import KEY_NAMES, asking_for_key

_COLLECTIONS = {"params", "batch_stats"}


class Functions(Adapter):
    """A model as two pure functions, such as your own pair or Haiku's `transform`.

    The names of `apply`'s arguments select what it gets. After the model's parameters come `state`,
    if it has that name, and `rng` or `key`, then the inputs; an `rng` or `key` after these is
    passed by keyword, and so is a mode flag, such as `train`, `is_training`, `deterministic` or
    `inference`. With `state`, `init` returns `(params, state)` and `apply` `(outputs, state)`; the
    state is the collection `state`, and changes in training only.

    `init` may take only the key, or the key and `input_shape`, as in `jax.example_libraries.stax`.
    In evaluation the key of `apply` is fixed. If a function has a mode flag under another name,
    pass it in the loss: `ctx.apply(params, x, my_flag=ctx.train)`.

    Args:
        init: `init(key, *inputs)`, or `init(key)`, returns the parameters: any pytree of arrays.
        apply: `apply(params, *inputs)` returns the outputs.

    Example:
        >>> def init(key, x):
        ...     return {"kernel": jax.random.normal(key, (x.shape[-1], 1))}
        >>> def apply(params, x):
        ...     return x @ params["kernel"]
        >>> model = Functions(init, apply)
    """

    def __init__(self, init: Callable[..., Any], apply: Callable[..., Any]) -> None:
        for name, function in (("init", init), ("apply", apply)):
            if not callable(function):
                raise ConfigError(
                    f"A model of two functions is (init, apply), but {name} is a "
                    f"{type(function).__name__}, which cannot be called. "
                    "Pass distaff.models.Functions(init, apply)."
                )
        self._init, self._apply = init, apply
        names = parameters(apply)
        self._has_state = names[1:2] == ["state"]
        position = 1 + self._has_state
        self._num_before = position
        self._key_is_positional = names[position : position + 1] in [[name] for name in KEY_NAMES]
        named = [name for name in KEY_NAMES if name in names]
        self._key_name = named[0] if named and not self._key_is_positional else None

    @property
    def module(self) -> Functions:
        """The pair itself."""
        return self

    @property
    def record(self) -> dict[str, Any]:
        """The names of the functions."""
        names = [getattr(f, "__qualname__", type(f).__name__) for f in (self._init, self._apply)]
        return {"$module": ", ".join(names), "kind": "functions"}

    def init(self, key: Key, *inputs: Any) -> Variables:
        """Calls `init`, in training mode if it has a mode flag."""
        if parameters(self._init)[1:2] == ["input_shape"]:  # jax.example_libraries.stax
            _, result = self._init(key, inputs[0].shape)
            return Variables(result)
        inputs = inputs[: num_positional(self._init) - 1]
        flag: dict[str, Any] = mode_flag(self._init, True, 1 + len(inputs))
        result = self._init(key, *inputs, **flag)
        if isinstance(result, Mapping) and set(result) >= _COLLECTIONS:
            raise ConfigError(
                f"init returned the collections {sorted(result)} of a Flax Linen module, all of "
                "which would be trained, but running statistics are not parameters. Pass the "
                "module itself as the model."
            )
        if not self._has_state:
            return Variables(result)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ConfigError(
                "init must return (params, state) for a model whose apply(params, state, ...) has "
                f"a state; it returned a {type(result).__name__}. Rename apply's second parameter "
                "if it is an input."
            )
        params, state = result
        return Variables(params, collections={"state": state} if jax.tree.leaves(state) else None)

    @accepts_collections
    def apply(
        self, variables: Variables, *inputs: Any, train: bool, key: Key | None, **kwargs: Any
    ) -> tuple[Any, Variables]:
        """Calls `apply`, with the key and the state if it accepts them."""
        first: list[Any] = [variables.params]
        if self._has_state:
            first.append((variables.collections or {}).get("state", {}))
        num_first = self._num_before + self._key_is_positional
        flags: dict[str, Any] = mode_flag(self._apply, train, num_first + len(inputs))
        if self._key_is_positional:
            first.append(key)
        elif self._key_name is not None:
            flags[self._key_name] = key
        flags.update(kwargs)
        takes_key = self._key_is_positional or self._key_name is not None
        with asking_for_key("The model", takes_key and key is None):
            outputs = self._apply(*first, *inputs, **flags)
        if not self._has_state:
            return outputs, variables
        outputs, state = outputs
        if not train or variables.collections is None:
            return outputs, variables
        return outputs, variables._replace(collections={**variables.collections, "state": state})

    def bind(self, variables: Variables) -> Callable[..., Any]:
        """Returns a function of the inputs with the parameters bound, in evaluation."""

        def bound(*inputs: Any, key: Key | None = None, **kwargs: Any) -> Any:
            return self.apply(variables, *inputs, train=False, key=key, **kwargs)[0]

        return bound

    def layers(self, key: Key, *inputs: Any) -> list[LayerRow]:
        """Lists the whole model as one row, with all of its arrays."""

        def evaluate(variables: Variables, key: Key, *inputs: Any) -> Any:
            return self.apply(variables, *inputs, train=False, key=key)[0]

        variables = jax.eval_shape(self.init, key, *inputs)
        outputs: dict[Path, str] = {(): describe(jax.eval_shape(evaluate, variables, key, *inputs))}
        count = flops(evaluate, variables, key, *inputs)
        return layer_rows(variables, {(): "Functions"}, outputs, own_flops(count, {}, {}))


class FunctionModel:
    """A user's forward function from `TrainState.apply_fn`.

    Args:
        apply_fn: called as `apply_fn({"params": params}, *inputs, **kwargs)`, with the state's
            other collections alongside `params`.
    """

    def __init__(self, apply_fn: Callable[..., Any]) -> None:
        self.module = self.record = apply_fn
        self.apply_fn = apply_fn

    def ready(self, key: Key) -> None:
        """Returns None: there are no variables."""

    def init(self, key: Key, *inputs: Any) -> Variables:
        """Raises ConfigError: a forward function cannot create its parameters."""
        raise ConfigError(
            "A forward function has no init. Create the parameters yourself and pass them to "
            "TrainState.create(params=...), or pass a model: distaff.models.Functions(init, apply)."
        )

    @accepts_collections
    def apply(
        self, variables: Variables, *inputs: Any, train: bool, key: Key | None, **kwargs: Any
    ) -> tuple[Any, Variables]:
        """Calls the function, with a mode flag and a key if it accepts them."""
        flags: dict[str, Any] = mode_flag(self.apply_fn, train, 1 + len(inputs))
        accepted = parameters(self.apply_fn)[1 + len(inputs) :]
        if key is not None:
            flags.update((name, key) for name in ("key", "rng") if name in accepted)
        outputs = self.apply_fn(variables.by_collection(), *inputs, **{**flags, **kwargs})
        return outputs, variables

    def bind(self, variables: Variables) -> Callable[..., Any]:
        """Returns the function with its parameters bound."""
        return lambda *inputs, **kwargs: self.apply_fn(variables.by_collection(), *inputs, **kwargs)

    def layers(self, key: Key, *inputs: Any) -> list[LayerRow]:
        """Returns no rows: a function has no modules."""
        return []

"""Models as plain functions behind the functional face: `(init, apply)`, or a forward alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from distaff.core.typing import Key
from distaff.errors import ConfigError
from distaff.models.adapter import Adapter, LayerRow, Variables
from distaff.models.as_in_linen import applies_collections
from distaff.models.flags import mode_flag, num_positional, parameters
from distaff.models.layers import Path, describe, flops, listed, own_flops
from distaff.models.randomness import KEY_NAMES, asking_for_key

_COLLECTIONS = {"params", "batch_stats"}


class Functions(Adapter):
    """A model as two pure functions, such as a pair of one's own or Haiku's `transform`.

    What `apply` takes is told by the names of its arguments. After the model's parameters come
    `state`, if it has that name, and `rng` or `key`, then the inputs; an `rng` or `key` further
    back is passed by keyword, and so is a mode flag, such as `train`, `is_training`,
    `deterministic` or `inference`. With `state`, `init` returns `(params, state)` and `apply`
    `(outputs, state)`: the state is the collection `state`, and changes in training only.

    `init` may take the key alone, or the key and `input_shape`, as those of
    `jax.example_libraries.stax` do. The key of `apply` is a fixed one in evaluation. A function
    that cannot be told whether it trains has to be by its caller:
    `ctx.apply(params, x, my_flag=ctx.train)`.

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
                    f"A model of two functions is (init, apply); {name} is of the type "
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
        """Calls `init`, which is told that it trains if it has a parameter for that."""
        if parameters(self._init)[1:2] == ["input_shape"]:  # jax.example_libraries.stax
            _, made = self._init(key, inputs[0].shape)
            return Variables(made)
        given = inputs[: num_positional(self._init) - 1]
        flag: dict[str, Any] = mode_flag(self._init, True, 1 + len(given))
        made = self._init(key, *given, **flag)
        if isinstance(made, Mapping) and set(made) >= _COLLECTIONS:
            raise ConfigError(
                f"What init returns is trained, and it returned the collections {sorted(made)}, "
                "as a Flax Linen module makes them: running statistics are no parameters. Pass the "
                "module itself as the model."
            )
        if not self._has_state:
            return Variables(made)
        if not isinstance(made, tuple) or len(made) != 2:
            raise ConfigError(
                "A model whose apply(params, state, ...) has a state returns (params, state) from "
                f"init; it returned a {type(made).__name__}. Rename apply's second parameter if "
                "it is an input."
            )
        params, state = made
        return Variables(params, collections={"state": state} if jax.tree.leaves(state) else None)

    @applies_collections
    def apply(
        self, variables: Variables, *inputs: Any, train: bool, key: Key | None, **kwargs: Any
    ) -> tuple[Any, Variables]:
        """Calls `apply`, with the key and the state where it takes them."""
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
        """Returns the function of the inputs, with its parameters inside, in evaluation."""

        def bound(*inputs: Any, key: Key | None = None, **kwargs: Any) -> Any:
            return self.apply(variables, *inputs, train=False, key=key, **kwargs)[0]

        return bound

    def layers(self, key: Key, *inputs: Any) -> list[LayerRow]:
        """Lists the whole model as one, with all of its arrays."""

        def evaluate(variables: Variables, key: Key, *inputs: Any) -> Any:
            return self.apply(variables, *inputs, train=False, key=key)[0]

        variables = jax.eval_shape(self.init, key, *inputs)
        outputs: dict[Path, str] = {(): describe(jax.eval_shape(evaluate, variables, key, *inputs))}
        count = flops(evaluate, variables, key, *inputs)
        return listed(variables, {(): "Functions"}, outputs, own_flops(count, {}, {}))


class FunctionModel:
    """Someone's own forward function, as found in `TrainState.apply_fn`.

    Args:
        apply_fn: called as `apply_fn({"params": params}, *inputs, **kwargs)`, with the state's
            other collections beside `params`.
    """

    def __init__(self, apply_fn: Callable[..., Any]) -> None:
        self.module = self.record = apply_fn
        self.apply_fn = apply_fn

    def ready(self, key: Key) -> None:
        """Returns None: `init` makes the variables."""

    def init(self, key: Key, *inputs: Any) -> Variables:
        """Refuses: a forward function does not say how its parameters are made."""
        raise ConfigError(
            "A forward function has no init. Make the parameters yourself and pass them to "
            "TrainState.create(params=...), or give a model: distaff.models.Functions(init, apply)."
        )

    @applies_collections
    def apply(
        self, variables: Variables, *inputs: Any, train: bool, key: Key | None, **kwargs: Any
    ) -> tuple[Any, Variables]:
        """Calls the function, which changes nothing, with its mode and a key if it takes them."""
        flags: dict[str, Any] = mode_flag(self.apply_fn, train, 1 + len(inputs))
        accepted = parameters(self.apply_fn)[1 + len(inputs) :]
        if key is not None:
            flags.update((name, key) for name in ("key", "rng") if name in accepted)
        outputs = self.apply_fn(variables.by_collection(), *inputs, **{**flags, **kwargs})
        return outputs, variables

    def bind(self, variables: Variables) -> Callable[..., Any]:
        """Returns the function with its parameters inside."""
        return lambda *inputs, **kwargs: self.apply_fn(variables.by_collection(), *inputs, **kwargs)

    def layers(self, key: Key, *inputs: Any) -> list[LayerRow]:
        """Lists nothing: a function has no modules."""
        return []

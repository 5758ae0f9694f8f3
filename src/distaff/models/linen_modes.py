"""The mode of a Linen module: sets fields and arguments, and observes its layers."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from distaff.core.config.checks import is_traced, is_zero
from distaff.core.typing import Key
from distaff.errors import ConfigError
from distaff.models.flags import mode_flag, switched
from distaff.models.observed import Observed
from distaff.models.randomness import KEY_NAMES

_MISSING_ARGUMENT = re.compile(r"(\w+)\.\w+\(\) missing \d+ required")
_SCOPE = re.compile(r"flax.core.scope\.py")


def in_mode(module: nn.Module, train: bool) -> nn.Module:
    """Returns an unbound module with mode fields set, such as `train: bool`, even nested ones.

    An inner module that was created for evaluation stays in it, as a frozen part; fields of Flax's
    own layers do not change. Without changes, it returns the module itself.
    """
    return _switched(module, train, is_inner=False, known={})


def _switched(node: Any, train: bool, *, is_inner: bool, known: dict[int, Any]) -> Any:
    if id(node) not in known:
        # Holding the node keeps its id from being reused.
        known[id(node)] = (node, _copy(node, train, is_inner=is_inner, known=known))
    return known[id(node)][1]


def _copy(node: Any, train: bool, *, is_inner: bool, known: dict[int, Any]) -> Any:
    def inside(value: Any) -> Any:
        return _switched(value, train, is_inner=True, known=known)

    if isinstance(node, nn.Module):
        changes = _changed_fields(node, train, is_inner=is_inner, known=known)
        return node.clone(**changes) if changes else node
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        changes = _changed_fields(node, train, is_inner=is_inner, known=known)
        return dataclasses.replace(node, **changes) if changes else node
    if type(node) in (list, tuple):
        items = type(node)(map(inside, node))
        return items if any(a is not b for a, b in zip(items, node, strict=True)) else node
    if type(node) is dict:
        values = {name: inside(value) for name, value in node.items()}
        return values if any(values[name] is not node[name] for name in node) else node
    if isinstance(node, functools.partial) and _is_user_defined(node.func):
        keywords = {n: _new_value(n, x, train, is_inner=True) for n, x in node.keywords.items()}
        is_same = all(keywords[n] is x for n, x in node.keywords.items())
        return node if is_same else functools.partial(node.func, *node.args, **keywords)
    return node


def _changed_fields(
    node: Any, train: bool, *, is_inner: bool, known: dict[int, Any]
) -> dict[str, Any]:
    changes = {}
    is_user_defined = _is_user_defined(type(node))
    for field in dataclasses.fields(node):
        if field.name in ("parent", "name") or not field.init or not hasattr(node, field.name):
            continue
        value = getattr(node, field.name)
        new = value
        if is_user_defined:
            new = _new_value(field.name, value, train, is_inner=is_inner)
        if new is value:
            # A configuration belongs to the module that holds it.
            is_config = dataclasses.is_dataclass(value) and not isinstance(value, nn.Module)
            inner = is_inner or not is_config
            new = _switched(value, train, is_inner=inner, known=known)
        if new is not value:
            changes[field.name] = new
    return changes


def _new_value(name: str, value: Any, train: bool, *, is_inner: bool) -> Any:
    is_for_evaluation = switched(name, value, False) is value
    return value if is_inner and is_for_evaluation else switched(name, value, train)


def _is_user_defined(cls: Any) -> bool:
    return getattr(cls, "__module__", "").partition(".")[0] != "flax"


def arguments(
    module: nn.Module,
    method: Callable[..., Any] | str | None,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    train: bool,
    key: Key | None,
    by_position: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and keyword arguments for a method of a module.

    A mode flag right after the inputs is passed by position, as `nn.remat` and `nn.jit` need static
    arguments. `by_position` passes a later flag by position too, with the arguments before it.
    Keyword arguments of the caller override others; `key` is for a parameter named `rng` or
    similar.
    """
    name = "__call__" if method is None else method
    function: Any = getattr(type(module), name) if isinstance(name, str) else name
    function = getattr(function, "__func__", function)
    accepted = _parameters(function)
    flags: dict[str, Any] = mode_flag(function, train, 1 + len(inputs))
    if not _is_user_defined(type(module)):
        flags = {name: x for name, x in flags.items() if getattr(module, name, None) is None}
    keys = _key_argument(accepted[len(inputs) :], kwargs, key)
    named, args = {**flags, **keys, **kwargs}, list(inputs)
    last = max((n for n, p in enumerate(accepted) if p.name in flags), default=-1)
    for parameter in accepted[len(inputs) : last + 1]:
        is_flag = parameter.name in flags
        is_free = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        has_value = parameter.name in named or parameter.default is not parameter.empty
        if not is_free or not (is_flag or by_position) or not has_value:
            break
        args.append(named.pop(parameter.name, parameter.default))
    return tuple(args), named


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())[1:]
    except (TypeError, ValueError):
        return []


def _key_argument(
    accepted: list[inspect.Parameter], kwargs: Mapping[str, Any], key: Key | None
) -> dict[str, Key]:
    """Returns a key for each parameter that needs one."""
    names = {parameter.name for parameter in accepted}
    missing = [
        parameter.name
        for parameter in accepted
        if parameter.name in KEY_NAMES
        and parameter.name not in kwargs
        and parameter.default is parameter.empty
        and not (parameter.name == "key" and names & {"query", "value"})
    ]
    if key is None or not missing:
        return {}
    keys = jax.random.split(jax.random.fold_in(key, 2), len(missing))
    return dict(zip(missing, keys, strict=True))


def call_by_keyword_or_position(call: Callable[[bool], Any], model: str) -> Any:
    """Calls a module with its mode by keyword, or by position if that fails.

    Static arguments of `nn.remat` and `nn.jit` must be passed by position; a keyword is traced.

    Args:
        call: a function of whether to pass all arguments up to the mode flag by position.
        model: name of the model, for errors.

    Raises:
        ConfigError: an argument is missing, or an initializer cannot be traced.
    """
    try:
        return call(False)
    except jax.errors.ConcretizationTypeError:
        pass
    except jax.errors.TracerArrayConversionError as error:
        if _SCOPE.search(str(error)) is None:
            raise
        # Linen traces the initializer of each parameter in every pass, to compare shapes.
        raise ConfigError(
            f"JAX cannot trace an initializer of {model}, which uses NumPy: "
            f"{str(error).partition('.')[0]}. Use jax.numpy in it, such as jnp.linalg.qr, or "
            "create the array before and return it from the initializer."
        ) from error
    except TypeError as error:
        missing = _MISSING_ARGUMENT.search(str(error))
        if missing is None or missing[1] != model:
            raise
        raise ConfigError(
            f"{model} needs more arguments than its mode and the inputs from model_inputs(batch): "
            f"{error}. For positional arguments, override model_inputs. For others, override "
            "run_model_init(example_batch, key), and pass them in the loss: "
            "ctx.apply(params, x, name=value)."
        ) from error
    except ValueError as error:
        if "static_argnums" not in str(error):
            raise
    return call(True)


class LayerObserver:
    """An interceptor for `nn.intercept_methods` that records dropout and running statistics."""

    def __init__(self, observed: Observed) -> None:
        self._observed = observed

    def __call__(self, call: Any, args: Any, kwargs: Mapping[str, Any], context: Any) -> Any:
        """Calls a method of a module; for dropout and normalization layers, records their mode."""
        module = context.module
        if context.method_name == "__call__":
            name = "/".join(module.path)
            if isinstance(module, nn.Dropout) and not is_zero(module.rate):
                is_off = _flag_of("deterministic", module, args, kwargs)
                self._observed.dropout(name, is_on=not _is_true(is_off))
            elif isinstance(module, nn.BatchNorm):
                is_off = _flag_of("use_running_average", module, args, kwargs)
                self._observed.statistics(name, is_on=not _is_true(is_off))
            elif isinstance(module, nn.MultiHeadDotProductAttention) and not is_zero(
                module.dropout_rate
            ):
                is_off = module.deterministic or kwargs.get("deterministic")
                self._observed.dropout(name, is_on=not _is_true(is_off))
        return call(*args, **kwargs)


def drop_at_traced_rate(call: Any, args: Any, kwargs: Mapping[str, Any], context: Any) -> Any:
    """An interceptor for `nn.intercept_methods` that lets `nn.Dropout` have a traced rate.

    The layer compares its rate with 0 and 1 in Python. It draws the same numbers here.
    """
    module = context.module
    is_layer = isinstance(module, nn.Dropout) and context.method_name == "__call__"
    if not is_layer or not is_traced(module.rate):
        return call(*args, **kwargs)
    bound = inspect.signature(nn.Dropout.__call__).bind(module, *args, **kwargs).arguments
    inputs, key = bound["inputs"], bound.get("rng")
    if _flag_of("deterministic", module, args, kwargs):
        return inputs
    key = module.make_rng(module.rng_collection) if key is None else key
    axes = module.broadcast_dims
    shape = [1 if n in axes or n - inputs.ndim in axes else x for n, x in enumerate(inputs.shape)]
    kept = 1 - module.rate
    is_kept = jax.random.bernoulli(key, kept, shape)
    # At rate 1 nothing is kept, and a division by 0 would make the gradient NaN.
    return jnp.where(is_kept, inputs / jnp.where(kept == 0, 1, kept).astype(inputs.dtype), 0)


def _flag_of(name: str, module: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Returns a layer's second argument, or its field of that name."""
    argument = args[1] if len(args) > 1 else kwargs.get(name)
    return getattr(module, name) if argument is None else argument


def _is_true(flag: Any) -> bool:
    """Returns whether a flag is true; a traced one counts as false."""
    return isinstance(flag, bool | int) and flag == 1

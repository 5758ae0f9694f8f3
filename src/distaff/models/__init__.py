"""Models of any kind as pure functions of their variables."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.nnx as flax_nnx

from distaff.core import optional
from distaff.data import Standardize, Transform
from distaff.errors import ConfigError
from distaff.models.adapter import LayerRow, Model, ModelWrapper, Variables, is_model
from distaff.models.functional import FunctionModel, Functions
from distaff.models.linen import LinenModel
from distaff.models.lora import Lora, LoraModel, rebuild
from distaff.models.nnx import NnxModel
from distaff.models.precision.model import InPrecision, stored, with_scale
from distaff.models.precision.options import (
    PrecisionConfig,
    PrecisionName,
    PrecisionOptions,
    precision_of,
)
from distaff.models.record import is_linen_class
from distaff.models.remat.model import RematModel
from distaff.models.remat.options import RematConfig, RematOptions, remat_of
from distaff.models.standardized import StandardizedModel

__all__ = [
    "Functions",
    "InPrecision",
    "LayerRow",
    "LinenModel",
    "Lora",
    "LoraModel",
    "Model",
    "NnxModel",
    "PrecisionConfig",
    "PrecisionOptions",
    "RematConfig",
    "RematModel",
    "RematOptions",
    "Variables",
    "as_model",
    "in_precision",
    "is_linen_class",
    "model_of",
    "plain_model",
    "precision_of",
    "rebuild",
    "rematerialized",
    "standardized",
    "stored",
    "whole_batches",
    "with_scale",
    "without_remat",
]

_POSSIBLE = (
    "a flax.linen.Module; a flax.nnx.Module, or a function f(rngs) that returns one; "
    "an equinox.Module, or a function f(key) that returns one; a pair (init, apply) of functions; "
    "a distaff.Lora of any of these; or an object with the methods of distaff.models.Model"
)


def as_model(source: Any) -> Model:
    """Wraps a user's model in the `Model` interface.

    Args:
        source: a `flax.linen.Module`, whose variables are kept if it is bound; a
            `flax.nnx.Module`, or a function `f(rngs)` that returns one; an `equinox.Module`,
            `(module, state)`, or a function `f(key)` that returns either; a pair `(init, apply)` of
            functions, such as Haiku's; or a `Model`.

    Returns:
        The model as pure functions; a `Model` is returned unchanged.

    Raises:
        ConfigError: it is something else, such as a class whose constructor has other arguments.
        MissingExtraError: a function `f(key)` is passed, and Equinox is not installed.
    """
    if isinstance(source, Lora):
        return LoraModel(as_model(source.module), source)
    if isinstance(source, nn.Module):
        return LinenModel(source)
    if isinstance(source, flax_nnx.Module):
        return NnxModel(source)
    if _is_equinox(source):
        return _equinox(source)
    if is_model(source):
        return source
    if isinstance(source, tuple) and len(source) == 2 and all(map(callable, source)):
        owner = _owner(*source)
        return Functions(*source) if owner is None else LinenModel(owner)
    match _only_argument(source):
        case "rngs":
            return NnxModel(source)
        case "key":
            return _equinox(source)
    raise ConfigError(_error_message(source))


def whole_batches(module: Any) -> Model:
    """Returns an Equinox model that is called with whole batches rather than mapped over examples.

    Args:
        module: a module, `(module, state)`, or a function `f(key)` that returns either.

    Raises:
        MissingExtraError: Equinox is not installed.
    """
    return _equinox(module, vmap=False)


def model_of(apply_fn: Callable[..., Any] | None) -> Model:
    """Returns the model of the forward function in a `TrainState`.

    Args:
        apply_fn: `module.apply` of a Linen module, `as_model(...).apply_fn`, or any
            `apply_fn(variables, *inputs)`.

    Raises:
        ConfigError: it is None.
    """
    if apply_fn is None:
        raise ConfigError(
            "ctx.apply needs TrainState.apply_fn, which is None. "
            "Create the state with TrainState.create(apply_fn=model.apply, ...)."
        )
    owner = getattr(apply_fn, "__self__", None)
    if isinstance(owner, nn.Module) and apply_fn == owner.apply:
        return LinenModel(owner)
    if is_model(owner) and apply_fn == owner.apply_fn:
        return owner
    return FunctionModel(apply_fn)


def in_precision(
    model: Model, precision: PrecisionName | PrecisionConfig, *, on_mesh: bool = False
) -> Model:
    """Returns a model whose forward passes compute in a precision, for a loop of your own.

    >>> model = in_precision(as_model(nn.Dense(2)), "bf16")
    >>> state = TrainState.create(apply_fn=model.apply_fn, ...)

    Args:
        model: a model from `as_model`.
        precision: `"float32"` returns the model itself; see `PrecisionConfig`.
        on_mesh: whether devices add up the gradients of parameters.

    Raises:
        ConfigError: the precision is unknown.
    """
    found = precision_of(precision)
    # Its forward function must not hold the arrays of a ready-made module.
    alone = model_of(model.apply_fn)
    return model if found.is_off else InPrecision(alone, found, on_mesh=on_mesh)


def rematerialized(model: Model, remat: str | tuple[str, ...] | RematConfig | None) -> Model:
    """Returns a model whose forward passes are rematerialized, for a loop of your own.

    Apply a precision to the result, not before.

    >>> model = rematerialized(as_model(zoo.GPT()), "Block_*")
    >>> state = TrainState.create(apply_fn=model.apply_fn, ...)

    Args:
        model: a model from `as_model`.
        remat: as the option of a trainer; None returns the model itself.

    Raises:
        ConfigError: it is not a value of the option.
    """
    found = remat_of(remat)
    # Its forward function must not hold the arrays of a ready-made module.
    return model if found is None else RematModel(model_of(model.apply_fn), found)


def without_remat(apply_fn: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Returns a forward function without rematerialization and pins, which change no value."""
    if apply_fn is None:
        return None
    model = model_of(apply_fn)
    found = _without_remat(model)
    return apply_fn if found is model else found.apply_fn


def _without_remat(model: Model) -> Model:
    if isinstance(model, InPrecision):
        inner = _without_remat(model.inner)
        return model if inner is model.inner else model.around(inner)
    plain: Any = getattr(model, "plain", None) if isinstance(model, ModelWrapper) else None
    return model if plain is None else _without_remat(plain)


def plain_model(model: Model) -> Model:
    """Returns a model without precision, rematerialization and standardized inputs."""
    while isinstance(model, ModelWrapper):
        model = model.inner
    return model


def standardized(model: Model, scale: Standardize | Transform | None) -> Model:
    """Returns a model whose first input is standardized; the model itself without a `scale`.

    Its forward function does not hold the arrays of a ready-made module.
    """
    return model if scale is None else StandardizedModel(model_of(model.apply_fn), scale)


def _owner(init: Any, apply: Any) -> nn.Module | None:
    """Returns the module whose bound methods `init` and `apply` these are, or None."""
    owner = getattr(apply, "__self__", None)
    if not isinstance(owner, nn.Module) or apply != owner.apply or init != owner.init:
        return None
    return owner


def _equinox(source: Any, **options: Any) -> Model:
    return optional.load("equinox", extra="equinox").EquinoxModel(source, **options)


def _is_equinox(source: Any) -> bool:
    """Returns whether this is an Equinox module or `(module, state)`; never imports Equinox."""
    first = source[0] if isinstance(source, tuple) and len(source) == 2 else source
    names = {cls.__module__.partition(".")[0] for cls in type(first).__mro__}
    return "equinox" in names and not isinstance(first, type)


def _only_argument(source: Any) -> str | None:
    """Returns `rngs` or `key` if a function or class can be called with only that argument."""
    if not callable(source):
        return None
    call = source if isinstance(source, functools.partial) else functools.partial(source)
    function: Any = call.func
    if isinstance(function, type):  # a metaclass may hide the signature of the constructor
        call = functools.partial(function.__init__, None, *call.args, **call.keywords)
    try:
        accepted = inspect.signature(call).parameters
    except (TypeError, ValueError):
        return None
    required = {
        name
        for name, parameter in accepted.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    for name in ("rngs", "key"):
        if name in accepted and name not in call.keywords and required <= {name}:
            return name
    return None


def _error_message(source: Any) -> str:
    if not isinstance(source, type):
        cls = type(source)
        return f"A model must be {_POSSIBLE}. Got {cls.__module__}.{cls.__qualname__}."
    name, call = source.__name__, f"{source.__name__}(...)"
    bases = {cls.__module__.partition(".")[0] for cls in source.__mro__}
    if issubclass(source, flax_nnx.Module):
        call = f"lambda rngs: {name}(..., rngs=rngs)"
    elif "equinox" in bases:
        call = f"lambda key: {name}(..., key=key)"
    elif not issubclass(source, nn.Module):
        return f"A model must be {_POSSIBLE}. Got the class {name}."
    return f"A model must be a module, not its class: pass {call} instead of {name}."

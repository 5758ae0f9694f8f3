"""The mode of a Linen module: fields that say it, and what its layers made of it in a pass."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from distaff.core.typing import Key
from distaff.errors import ConfigError
from distaff.models.flags import mode_flag, switched
from distaff.models.observed import Observed
from distaff.models.randomness import KEY_NAMES

_OWN = "flax"
_LACKS = re.compile(r"(\w+)\.\w+\(\) missing \d+ required")
_SCOPE = re.compile(r"flax.core.scope\.py")


def in_mode(module: nn.Module, train: bool) -> nn.Module:
    """Returns a module whose fields say that it trains, or that it does not.

    Fields such as `train: bool` are switched, also in a configuration that a field holds. An inner
    module that was made for evaluation stays so, as a frozen part; layers of Flax itself keep what
    they were made with.

    Args:
        module: an unbound module. It is returned itself where nothing changes.
        train: whether it trains.
    """
    return _switched(module, train, is_inner=False, known={})


def _switched(node: Any, train: bool, *, is_inner: bool, known: dict[int, Any]) -> Any:
    if id(node) not in known:
        # The node is kept beside its copy: another object may not get its id meanwhile.
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
    if isinstance(node, functools.partial) and _is_users(node.func):
        keywords = {n: _new_value(n, x, train, is_inner=True) for n, x in node.keywords.items()}
        is_same = all(keywords[n] is x for n, x in node.keywords.items())
        return node if is_same else functools.partial(node.func, *node.args, **keywords)
    return node


def _changed_fields(
    node: Any, train: bool, *, is_inner: bool, known: dict[int, Any]
) -> dict[str, Any]:
    changes = {}
    is_users = _is_users(type(node))
    for field in dataclasses.fields(node):
        if field.name in ("parent", "name") or not field.init or not hasattr(node, field.name):
            continue
        value = getattr(node, field.name)
        new = _new_value(field.name, value, train, is_inner=is_inner) if is_users else value
        if new is value:
            # A configuration speaks for the module that holds it.
            is_config = dataclasses.is_dataclass(value) and not isinstance(value, nn.Module)
            inner = is_inner or not is_config
            new = _switched(value, train, is_inner=inner, known=known)
        if new is not value:
            changes[field.name] = new
    return changes


def _new_value(name: str, value: Any, train: bool, *, is_inner: bool) -> Any:
    is_for_evaluation = switched(name, value, False) is value
    return value if is_inner and is_for_evaluation else switched(name, value, train)


def _is_users(cls: Any) -> bool:
    return getattr(cls, "__module__", "").partition(".")[0] != _OWN


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
    """Returns what to call a method of a module with, by position and by keyword.

    A mode flag that comes right after the inputs is passed by position, as `nn.remat` and `nn.jit`
    want their static arguments.

    Args:
        module: the module.
        method: as of `module.apply`; None for `__call__`.
        inputs: passed by position.
        kwargs: what the caller passes by keyword; it wins.
        train: whether the module trains.
        key: for a parameter without a default that is called `rng` or the like.
        by_position: whether also a flag further back is passed by position, after what stands
            before it.
    """
    name = "__call__" if method is None else method
    function: Any = getattr(type(module), name) if isinstance(name, str) else name
    function = getattr(function, "__func__", function)
    accepted = _parameters(function)
    is_own = not _is_users(type(module))
    flags = {
        name: value
        for name, value in mode_flag(function, train, 1 + len(inputs)).items()
        if not (is_own and getattr(module, name, None) is not None)
    }
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
    """Returns a key for each parameter that must be given one."""
    names = {parameter.name for parameter in accepted}
    wanted = [
        parameter.name
        for parameter in accepted
        if parameter.name in KEY_NAMES
        and parameter.name not in kwargs
        and parameter.default is parameter.empty
        and not (parameter.name == "key" and names & {"query", "value"})
    ]
    if key is None or not wanted:
        return {}
    return dict(zip(wanted, jax.random.split(jax.random.fold_in(key, 2), len(wanted)), strict=True))


def lifted(call: Callable[[bool], Any], model: str) -> Any:
    """Calls a module whose mode is passed by keyword, or by position where it has to be.

    `nn.remat` and `nn.jit` have static arguments by position alone; a flag by keyword is traced.

    Args:
        call: takes whether all arguments up to the mode flag are passed by position.
        model: its name, for errors.

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
            f"JAX traces an initializer of {model}, which computes with NumPy, and cannot: "
            f"{str(error).partition('.')[0]}. Use jax.numpy in it, such as jnp.linalg.qr; or make "
            "the array before, and let the initializer return it."
        ) from error
    except TypeError as error:
        found = _LACKS.search(str(error))
        if found is None or found[1] != model:
            raise
        raise ConfigError(
            f"{model} is called with what model_inputs(batch) returns and with its mode, and needs "
            f"more: {error}. For positional arguments, override model_inputs. For others, "
            "override run_model_init(example_batch, key), and pass them in the loss: "
            "ctx.apply(params, x, name=value)."
        ) from error
    except ValueError as error:
        if "static_argnums" not in str(error):
            raise
    return call(True)


class LayerObserver:
    """Notes which layers of Flax dropped or moved their statistics; see `nn.intercept_methods`."""

    def __init__(self, observed: Observed) -> None:
        self._observed = observed

    def __call__(self, call: Any, args: Any, kwargs: Mapping[str, Any], context: Any) -> Any:
        """Calls a method of a module, and notes it if it is such a layer."""
        module = context.module
        if context.method_name == "__call__":
            name = "/".join(module.path)
            if isinstance(module, nn.Dropout) and module.rate > 0:
                is_off = _given("deterministic", 1, module, args, kwargs)
                self._observed.dropout(name, is_on=not _is(is_off))
            elif isinstance(module, nn.BatchNorm):
                is_off = _given("use_running_average", 1, module, args, kwargs)
                self._observed.statistics(name, is_on=not _is(is_off))
            elif isinstance(module, nn.MultiHeadDotProductAttention) and module.dropout_rate > 0:
                is_off = module.deterministic or kwargs.get("deterministic")
                self._observed.dropout(name, is_on=not _is(is_off))
        return call(*args, **kwargs)


def _given(name: str, position: int, module: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    given = args[position] if len(args) > position else kwargs.get(name)
    return getattr(module, name) if given is None else given


def _is(flag: Any) -> bool:
    """Whether a flag is true; one that is traced counts as false."""
    return flag is True or flag == 1 if isinstance(flag, bool | int) else False

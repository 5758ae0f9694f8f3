"""Loads the weights of a source into a model; errors name each leaf that differs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distaff.checkpoint.weights.init_from import InitFrom
from distaff.checkpoint.weights.names import listed, matching, named, parts
from distaff.checkpoint.weights.pytorch import (
    TorchRules,
    as_rules,
    converted,
    make_plan,
    modules_of,
)
from distaff.checkpoint.weights.source import (
    ShapeAndDtype,
    WeightSource,
    is_random_key,
    open_source,
)
from distaff.core.typing import PyTree
from distaff.errors import CheckpointError, leaf_name
from distaff.execution import placement
from distaff.models import Variables
from distaff.models.lora import LoraModel, is_own


class Loaded(NamedTuple):
    """A model's arrays after loading, and a summary of their origin."""

    variables: Variables
    text: str


def loaded(
    model: Any,
    variables: Variables,
    init_from: InitFrom,
    init: Callable[[], Any] | None = None,
) -> Loaded:
    """Returns a model's arrays with the weights of a source.

    A `Lora` loads the weights of its base, unless the source has weights of the adapters.

    Args:
        model: the adapter of the model.
        variables: its initial arrays, which define shapes, dtypes and placement.
        init_from: the source and options.
        init: creates the variables, for `rules`, to see the modules of the model; only traced.

    Raises:
        CheckpointError: the source cannot be read, or does not match; names each leaf.
        ConfigError: a pattern matches nothing.
    """
    source, rules = open_source(init_from.source, init_from.weights), as_rules(init_from.rules)
    if isinstance(model, LoraModel) and not any(is_own(name) for name in source.forms):
        base = model.base(variables)
        converted = source if rules is None else _converted(source, model, base, rules, init)
        filled, text = _loaded(base, converted, init_from)
        return Loaded(model.with_base(variables, filled), text)
    if rules is not None:
        source = _converted(source, model, variables, rules, init)
    return _loaded(variables, source, init_from)


def _converted(
    source: WeightSource, model: Any, variables: Variables, rules: TorchRules, init: Any
) -> WeightSource:
    return converted(source, make_plan(variables, modules_of(model, init), rules), rules)


def _loaded(variables: Variables, source: WeightSource, init_from: InitFrom) -> Loaded:
    arrays = named(variables)
    keys = {name for name, leaf in arrays.items() if is_random_key(leaf)}
    model = {name: leaf for name, leaf in arrays.items() if name not in keys}
    wanted = matching(list(model), init_from.only)
    offered, problems = _rename(source, init_from, keys)
    found = [name for name in wanted if name in offered]
    kept = [name for name in wanted if name not in offered]
    problems += _differences(model, found, offered, source)
    problems += [source.wrong[name] for name in wanted if name in source.wrong]
    kept = [name for name in kept if name not in source.wrong]
    if init_from.missing == "error" or not found:
        problems += [_missing(name, model[name], source) for name in kept]
    if init_from.unused == "error":
        problems += [
            f"unused: {_both(old, new)}, {_form(source.forms[old])}"
            for new, old in offered.items()
            if new not in model
        ]
        problems += [f"unused: {name!r}, {_form(x)}" for name, x in source.unused.items()]
    if problems:
        raise _mismatch(source, problems, init_from)
    read = source.read([offered[name] for name in found])
    values = {name: read[offered[name]] for name in found}
    casts = Counter(
        f"{values[name].dtype} -> {model[name].dtype}"
        for name in found
        if values[name].dtype != model[name].dtype
    )
    placed = {name: _cast(name, values[name], model[name], source) for name in found}
    text = f"weights from {source.origin}: {len(found)} arrays, {len(model) - len(found)} kept"
    text += "".join(f"; {number} converted {cast}" for cast, number in casts.items())
    return Loaded(_fill(variables, placed), text)


def _rename(
    source: WeightSource, init_from: InitFrom, keys: set[str]
) -> tuple[dict[str, str], list[str]]:
    """Returns the names in the source by their names in the model, and problems with them."""
    offered: dict[str, str] = {}
    problems = []
    for old in source.forms:
        new = init_from.renamed(old)
        if new in offered:
            problems.append(f"same name twice: {offered[new]!r} and {old!r} become {new!r}")
        offered[new] = old
    if init_from.rename and all(new == old for new, old in offered.items()):
        problems.append(f"without effect: rename={dict(init_from.rename)!r} changes no name")
    return {new: old for new, old in offered.items() if new not in keys}, problems


def _differences(
    model: dict[str, Any], found: list[str], offered: dict[str, str], source: WeightSource
) -> Iterator[str]:
    for name in found:
        theirs, ours = source.forms[offered[name]], _form_of(model[name])
        if theirs[0] != ours[0] or not _fits(theirs[1], ours[1]):
            kind = "shape" if theirs[0] != ours[0] else "dtype"
            where = _both(offered[name], name)
            yield f"other {kind}: {where} is {_form(theirs)} in the source, {_form(ours)} here"


def _fits(theirs: Any, ours: Any) -> bool:
    """Returns whether a dtype may be cast to another: floats may change their width."""
    floats = jnp.issubdtype(theirs, jnp.floating) and jnp.issubdtype(ours, jnp.floating)
    return theirs == ours or (floats and np.dtype(theirs).itemsize != np.dtype(ours).itemsize)


def _cast(name: str, value: np.ndarray, like: Any, source: WeightSource) -> jax.Array:
    """Returns an array with the dtype and placement of another."""
    with np.errstate(over="ignore"):  # checked below
        cast = value.astype(like.dtype)
    if cast.dtype != value.dtype and not np.array_equal(np.isfinite(cast), np.isfinite(value)):
        raise CheckpointError(
            f"Finite weights must stay finite in the dtype of the model; {name!r} from "
            f"{source.origin} has numbers that {cast.dtype} cannot hold. Use a wider dtype in the "
            "model."
        )
    return placement.like(cast, like)


def _fill(variables: Variables, values: dict[str, jax.Array]) -> Variables:
    def filled(prefix: str, tree: PyTree) -> PyTree:
        return jax.tree.map_with_path(
            lambda path, leaf: values.get(prefix + leaf_name(path), leaf), tree
        )

    trees = {prefix: filled(prefix, tree) for prefix, tree in parts(variables).items()}
    params, batch_stats = trees.pop(""), trees.pop("batch_stats/", None)
    others = {prefix.removesuffix("/"): tree for prefix, tree in trees.items()}
    return Variables(params, batch_stats, others or None)


def _mismatch(source: WeightSource, problems: list[str], init_from: InitFrom) -> CheckpointError:
    names = "rename={'^encoder/': 'backbone/'}"
    if init_from.rules is not None:
        names = "rules=TorchRules({'layers.{}.attn': 'Block_{}/attention'})"
    return CheckpointError(
        f"The weights in init_from do not match the model; {source.origin} differs:"
        f"{listed(problems)}\n"
        f"Declare differences with InitFrom(source, ...): {names} for other names, "
        "only='backbone/*' for a part of the model, missing='keep' for the model's own initial "
        "values, unused='ignore' for arrays that the model lacks."
    )


def _missing(name: str, leaf: Any, source: WeightSource) -> str:
    where = f": {source.absent[name]}" if name in source.absent else ""
    return f"missing: {name!r}, {_form(_form_of(leaf))}{where}"


def _form_of(leaf: Any) -> ShapeAndDtype:
    return tuple(leaf.shape), leaf.dtype


def _form(form: ShapeAndDtype) -> str:
    return f"{form[1]}{list(form[0])}"


def _both(old: str, new: str) -> str:
    return repr(new) if old == new else f"{new!r} (from {old!r})"

"""Collections of a Linen module: opens boxes, selects those that are state or to be returned."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import jax
from flax.core import DenyList, meta
from flax.errors import ModifyScopeVariableError

from distaff.errors import leaf_name
from distaff.models.observed import statistics_in_evaluation

_ADDRESS = re.compile(r"0x[0-9a-f]+")
_WHERE = re.compile(r'in "/?([^"]*)" because')

AxisNames: TypeAlias = tuple[str | None, ...]
"""What a module calls the axes of a parameter; None for an axis without a name."""

_recorded: ContextVar[dict[str, AxisNames | None] | None] = ContextVar("axes", default=None)


@contextmanager
def recording_axis_names() -> Generator[dict[str, AxisNames | None]]:
    """Returns a context that records the axis names of the parameters that are created in it.

    Its value has a key for the path of each parameter, such as `Dense_0/kernel`, and None for one
    without names.
    """
    found: dict[str, AxisNames | None] = {}
    token = _recorded.set(found)
    try:
        yield found
    finally:
        _recorded.reset(token)


def record_axis_names(names: Mapping[str, AxisNames | None]) -> None:
    """Records names, within `recording_axis_names`."""
    found = _recorded.get()
    if found is not None:
        found.update({path: each for path, each in names.items() if each or path not in found})


def opened(collections: Any) -> Any:
    """Returns collections without boxes (`nn.with_partitioning`), whose names are recorded.

    Args:
        collections: collections by name, or a named tuple of them.
    """
    if _recorded.get() is not None:
        by_name = collections if isinstance(collections, Mapping) else collections._asdict()
        record_axis_names(_names(by_name.get("params")))
    return meta.unbox(collections)


def _names(params: Any) -> dict[str, AxisNames | None]:
    leaves = jax.tree.leaves_with_path(params, is_leaf=_is_box)
    return {leaf_name(path): getattr(box, "names", None) for path, box in leaves}


def _is_box(node: Any) -> bool:
    return isinstance(node, meta.AxisMetadata)


def state_collections(collections: Mapping[str, Any], run: Callable[..., Any]) -> dict[str, Any]:
    """Returns the collections that carry state from one pass to the next.

    Excludes a collection that no pass reads, since modules sow into it, and one that no pass needs
    or changes, since it is for gradients (`perturb`). `run(collections, train, mutable)` returns
    the module's result.
    """
    kept = dict(collections)
    others = [name for name in collections if name not in ("params", "batch_stats")]
    if not others:
        return kept
    changing = [name for name in collections if name != "params"]
    unchanged: set[str] = set()

    def train(given: Mapping[str, Any]) -> Any:
        changed = run(given, True, changing)[1]
        unchanged.update(name for name in others if _is_same(given[name], changed.get(name)))
        return changed

    after = jax.eval_shape(train, collections)
    for name in others:
        kept[name] = _without_growing(collections[name], after.get(name, {}))
        if not kept[name] or _is_unused(name, collections, run, is_same=name in unchanged):
            del kept[name]
    return kept


def _without_growing(before: Any, after: Any) -> Any:
    """Returns a collection without the variables whose structure a pass changes."""
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return before
    kept = {name: _without_growing(x, after.get(name, x)) for name, x in before.items()}
    return {
        name: x
        for name, x in kept.items()
        if isinstance(x, Mapping) or jax.tree.structure(x) == jax.tree.structure(after.get(name, x))
    }


def _is_unused(
    name: str, collections: Mapping[str, Any], run: Callable[..., Any], *, is_same: bool
) -> bool:
    """Returns whether a pass has the same result without a collection."""

    def program(without: str | None) -> str:
        def evaluate(given: Mapping[str, Any]) -> Any:
            return run({n: tree for n, tree in given.items() if n != without}, False, False)

        return _ADDRESS.sub("", str(jax.make_jaxpr(evaluate)(collections)))

    try:
        reduced = program(name)
    except Exception:  # The pass needs it; errors of the model itself surface elsewhere.
        return False
    return is_same or reduced == program(None)


def _is_same(before: Any, after: Any) -> bool:
    leaves = jax.tree.leaves(before), jax.tree.leaves(after)
    return len(leaves[0]) == len(leaves[1]) and all(map(lambda a, b: a is b, *leaves))


def evaluate_dropping_changes(
    call: Callable[[Any], Any],
    collections: Mapping[str, Any],
    mutable: Any,
    error: ModifyScopeVariableError,
    model: str,
) -> Any:
    """Calls a module that changes collections in evaluation, and drops the changes.

    Args:
        call: a function of the collections that may change.
        collections: all collections; parameters and running statistics may not change.
        mutable: the collections to return.
        error: the error that Linen raised when no collection was allowed to change.
        model: name of the model, for errors.

    Raises:
        ConfigError: it would change running statistics.
    """
    others = [name for name in collections if name not in ("params", "batch_stats")]
    try:
        if '"batch_stats"' in str(error) or not others:
            raise error
        outputs = call(join_filters(others, mutable))
    except ModifyScopeVariableError as second:
        if '"batch_stats"' not in str(second):
            raise
        where = _WHERE.search(str(second))
        raise statistics_in_evaluation(model, [where[1]] if where else []) from second
    return outputs[0] if mutable is False else outputs


def is_requested(requested: Any) -> bool:
    """Returns whether the caller has passed `mutable=`."""
    return requested is not None and requested is not False


def matches(requested: Any, name: str) -> bool:
    """Returns whether a collection matches the caller's `mutable=`."""
    if isinstance(requested, DenyList):
        return not matches(requested.deny, name)
    if isinstance(requested, bool | None):
        return bool(requested)
    return name == requested if isinstance(requested, str) else name in requested


def join_filters(kept: list[str], requested: Any) -> Any:
    """Returns the argument `mutable` of `module.apply` for kept and requested collections."""
    if requested is True:
        return True
    if isinstance(requested, DenyList):
        denied = [requested.deny] if isinstance(requested.deny, str) else requested.deny
        if isinstance(denied, bool):
            return kept if denied else True
        return DenyList([name for name in denied if name not in kept])
    names = [requested] if isinstance(requested, str) else list(requested or ())
    return list(dict.fromkeys([*kept, *names])) if kept or is_requested(requested) else False


def without_added(before: Any, after: Any) -> Any:
    """Returns a collection after a pass, without the variables that the pass has added."""
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return after
    return {n: without_added(x, after[n]) if n in after else x for n, x in before.items()}

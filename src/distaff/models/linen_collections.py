"""The collections of a Linen module: which are state, and which a pass hands back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax.core import DenyList
from flax.errors import ModifyScopeVariableError

from distaff.models.observed import statistics_in_evaluation

_ADDRESS = re.compile(r"0x[0-9a-f]+")
_WHERE = re.compile(r'in "/?([^"]*)" because')


def carried(collections: Mapping[str, Any], run: Callable[..., Any]) -> dict[str, Any]:
    """Returns the collections that are state: those that one pass leaves for the next one.

    Not among them is one that no pass reads, since modules sow into it, and one that no pass needs
    and none changes, since it is there for gradients (`perturb`).

    Args:
        collections: all that `init` has made.
        run: `(collections, train, mutable)` returns what the module does.
    """
    kept = dict(collections)
    others = [name for name in collections if name not in ("params", "batch_stats")]
    if not others:
        return kept
    changing = [name for name in collections if name != "params"]
    same: set[str] = set()

    def trained(given: Mapping[str, Any]) -> Any:
        changed = run(given, True, changing)[1]
        same.update(name for name in others if _is_same(given[name], changed.get(name)))
        return changed

    after = jax.eval_shape(trained, collections)
    for name in others:
        kept[name] = _steady(collections[name], after.get(name, {}))
        if not kept[name] or _is_idle(name, collections, run, is_same=name in same):
            del kept[name]
    return kept


def _steady(before: Any, after: Any) -> Any:
    """Returns a collection without the variables whose form a pass changes: they grow."""
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return before
    found = {name: _steady(x, after.get(name, x)) for name, x in before.items()}
    return {
        name: x
        for name, x in found.items()
        if isinstance(x, Mapping) or jax.tree.structure(x) == jax.tree.structure(after.get(name, x))
    }


def _is_idle(
    name: str, collections: Mapping[str, Any], run: Callable[..., Any], *, is_same: bool
) -> bool:
    """Tells whether a pass does as well without a collection."""

    def program(without: str | None) -> str:
        def evaluated(given: Mapping[str, Any]) -> Any:
            return run({n: tree for n, tree in given.items() if n != without}, False, False)

        return _ADDRESS.sub("", str(jax.make_jaxpr(evaluated)(collections)))

    try:
        alone = program(name)
    except Exception:  # It is missed. What is wrong with the model itself is told elsewhere.
        return False
    return is_same or alone == program(None)


def _is_same(before: Any, after: Any) -> bool:
    leaves = jax.tree.leaves(before), jax.tree.leaves(after)
    return len(leaves[0]) == len(leaves[1]) and all(map(lambda a, b: a is b, *leaves))


def evaluated(
    call: Callable[[Any], Any],
    collections: Mapping[str, Any],
    mutable: Any,
    error: ModifyScopeVariableError,
    model: str,
) -> Any:
    """Calls a module in evaluation that changes collections all the same, and drops the changes.

    Args:
        call: takes the names of the collections that may change.
        collections: all there are. Parameters and running statistics may not change.
        mutable: what the caller wants back.
        error: what Linen raised where none of them might.
        model: its name, for errors.

    Raises:
        ConfigError: it would move its running statistics.
    """
    others = [name for name in collections if name not in ("params", "batch_stats")]
    try:
        if '"batch_stats"' in str(error) or not others:
            raise error
        outputs = call(joined(others, mutable))
    except ModifyScopeVariableError as still:
        if '"batch_stats"' not in str(still):
            raise
        found = _WHERE.search(str(still))
        raise statistics_in_evaluation(model, [found[1]] if found else []) from still
    return outputs[0] if mutable is False else outputs


def is_asked(asked: Any) -> bool:
    """Tells whether the caller has named collections: `mutable=` of `module.apply`."""
    return asked is not None and asked is not False


def wants(asked: Any, name: str) -> bool:
    """Tells whether the caller wants a collection back."""
    if isinstance(asked, DenyList):
        return not wants(asked.deny, name)
    if isinstance(asked, bool | None):
        return bool(asked)
    return name == asked if isinstance(asked, str) else name in asked


def joined(kept: list[str], asked: Any) -> Any:
    """Returns the filter of collections that may change: those that are kept, and those asked for.

    Returns:
        As `module.apply` takes it; False where there are none.
    """
    if asked is True:
        return True
    if isinstance(asked, DenyList):
        denied = [asked.deny] if isinstance(asked.deny, str) else asked.deny
        if isinstance(denied, bool):
            return kept if denied else True
        return DenyList([name for name in denied if name not in kept])
    names = [asked] if isinstance(asked, str) else list(asked or ())
    return list(dict.fromkeys([*kept, *names])) if kept or is_asked(asked) else False


def as_before(before: Any, after: Any) -> Any:
    """Returns a collection after a pass, without the variables that the pass has added."""
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return after
    return {name: as_before(x, after[name]) if name in after else x for name, x in before.items()}

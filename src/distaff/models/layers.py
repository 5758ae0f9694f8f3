"""Rows of the model table: outputs, FLOPs, and the owner of each array."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import jax

from distaff.core.typing import Key
from distaff.errors import leaf_name
from distaff.models.adapter import LayerRow, Model, Variables

Path = tuple[str, ...]

_RECORDING = threading.RLock()


def describe(outputs: Any) -> str:
    """Returns shapes and dtypes of a module's output, such as `float32[64,8,8,32]`."""
    leaves = [leaf for leaf in jax.tree.leaves(outputs) if hasattr(leaf, "shape")]
    return ", ".join(f"{leaf.dtype}{list(leaf.shape)}".replace(" ", "") for leaf in leaves)


def flops(function: Callable[..., Any], *arguments: Any) -> float | None:
    """Returns XLA's estimate for one call, before optimization; None if unavailable."""
    try:
        analysis = jax.jit(function).lower(*arguments).cost_analysis()
    except Exception:  # Some modules only work within their parent; some backends do not count.
        return None
    return None if analysis is None else analysis.get("flops", 0.0)


def by_module(variables: Any, modules: Collection[Path]) -> dict[Path, list[Any]]:
    """Assigns each array to the deepest called module whose path its own path starts with."""
    owned: dict[Path, list[Any]] = {}
    for path, leaf in jax.tree.leaves_with_path(variables):
        collection, *names = leaf_name(path).split("/")
        depths = range(len(names) - 1, -1, -1)
        depth = next((n for n in depths if tuple(names[:n]) in modules), 0)
        row = (collection, "/".join(names[depth:]), tuple(leaf.shape), leaf.dtype)
        owned.setdefault(tuple(names[:depth]), []).append(row)
    return owned


def own_flops(
    whole: float | None, totals: Mapping[Path, float | None], callers: Mapping[Path, Path]
) -> dict[Path, float]:
    """Subtracts the FLOPs of each module from its caller's.

    Args:
        whole: FLOPs of the model.
        totals: FLOPs of each called module, including the modules it calls; None to count it as
            part of its caller.
        callers: caller of each module; `()` is the model.

    Returns:
        FLOPs by path; empty if the model's are unknown.
    """
    if not whole:
        return {}
    known = {path: total for path, total in totals.items() if total is not None}
    own = {(): whole, **known}
    for path, total in known.items():
        caller = callers[path]
        while caller not in own:
            caller = callers[caller]
        own[caller] -= total
    # Work with an unused result is in a module's count, but not in its caller's.
    return {path: max(count, 0.0) for path, count in own.items()}


def layer_rows(
    variables: Variables,
    kinds: Mapping[Path, str],
    outputs: Mapping[Path, str],
    flops: Mapping[Path, float],
) -> list[LayerRow]:
    """Returns the rows of a model: the modules that were called or have arrays.

    Args:
        variables: the model's arrays, or their shapes.
        kinds: class name of each module.
        outputs: outputs of called modules in order of call, from `describe`.
        flops: FLOPs of each module by itself; `()` has those that are not split by module.
    """
    collections = variables.by_collection()
    owners = {path for path, arrays in by_module(collections, {(), *kinds}).items() if arrays}
    paths = [path for path in outputs if path in kinds]
    paths = list(dict.fromkeys([(), *paths, *(path for path in kinds if path in owners)]))
    owned = by_module(collections, paths)
    return [
        LayerRow(
            "/".join(path),
            kinds[path],
            outputs.get(path, ""),
            tuple(owned.get(path, ())),
            flops.get(path),
        )
        for path in paths
    ]


class OpenModule(NamedTuple):
    """A model's module with its variables bound.

    Attributes:
        modules: the module and its submodules, by path.
        call: a function from inputs to the model's outputs.
    """

    modules: Mapping[Path, Any]
    call: Callable[..., Any]


class Library(NamedTuple):
    """Library-specific functions for inspecting modules.

    Attributes:
        split: splits a module into a pytree and a function that rebuilds it.
        outputs_of: selects the part of a module's result to show.
        calls: number of examples for which one pass calls a module, one by one.
    """

    split: Callable[[Any], tuple[Any, Callable[[Any], Any]]]
    outputs_of: Callable[[Any], Any] = lambda result: result
    calls: int = 1


def trace_layers(
    model: Model,
    open_module: Callable[[Variables, Key, bool], OpenModule],
    key: Key,
    inputs: tuple[Any, ...],
    library: Library,
) -> list[LayerRow]:
    """Returns the rows of a model in order of call, by abstract evaluation.

    Args:
        model: a model whose `init` needs no inputs.
        open_module: a function of variables, a key, and whether to train.
        key: a key, or its shape.
        inputs: inputs of the model, or their shapes, `[batch, ...]`.
        library: functions for its modules.
    """
    kinds: dict[Path, str] = {}

    def forward(calls: _Calls, train: bool, variables: Variables, key: Key, *inputs: Any) -> Any:
        modules, call = open_module(variables, key, train)
        kinds.update({path: type(each).__name__ for path, each in modules.items()})
        with _recorded_calls(modules, calls):
            result = call(*inputs)
        calls.outputs[()] = describe(result)
        return result

    variables = jax.eval_shape(model.init, key)
    training, evaluation = _Calls(library), _Calls(library)
    jax.eval_shape(functools.partial(forward, training, True), variables, key, *inputs)
    whole = flops(functools.partial(forward, evaluation, False), variables, key, *inputs)
    per_call = {path: flops(*call) for path, call in evaluation.calls.items()}
    counts = {path: n if n is None else n * library.calls for path, n in per_call.items()}
    own = own_flops(whole, counts, evaluation.callers)
    return layer_rows(variables, kinds, training.outputs, own)


class _Calls:
    """The first call of each module in a pass.

    Attributes:
        outputs: outputs from `describe`, by path in order of call.
        callers: caller of each module.
        calls: each call as a function of arrays, and the shapes of these.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self.outputs: dict[Path, str] = {}
        self.callers: dict[Path, Path] = {}
        self.calls: dict[Path, tuple[Callable[..., Any], Any]] = {}
        self._active: list[Path] = [()]

    @contextmanager
    def record(self, path: Path, original: Any, module: Any, arguments: Any) -> Generator[None]:
        """Records a call; calls within the context have this module as their caller."""
        if path:
            self.callers[path] = self._active[-1]
            self.calls[path] = _as_function(original, *self._library.split(module), arguments)
        self.outputs[path] = ""
        self._active.append(path)
        yield
        self._active.pop()

    def record_outputs(self, path: Path, outputs: Any) -> None:
        """Records the outputs of a call."""
        self.outputs[path] = describe(self._library.outputs_of(outputs))


def _as_function(
    original: Any, tree: Any, merge: Callable[[Any], Any], arguments: Any
) -> tuple[Callable[..., Any], Any]:
    leaves, structure = jax.tree.flatten((tree, arguments))
    shapes = {
        n: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for n, x in enumerate(leaves)
        if hasattr(x, "shape")
    }
    rest = {n: x for n, x in enumerate(leaves) if n not in shapes}

    def call(arrays: dict[int, Any]) -> Any:
        by_index = {**rest, **arrays}
        ordered = [by_index[n] for n in range(len(by_index))]
        tree, (args, kwargs) = jax.tree.unflatten(structure, ordered)
        return original(merge(tree), *args, **kwargs)

    return call, shapes


@contextmanager
def _recorded_calls(modules: Mapping[Path, Any], calls: _Calls) -> Generator[None]:
    """Records calls of modules, for libraries without a hook for calls.

    It replaces `__call__` of their classes while it is open, in one thread at a time.
    """
    paths = {id(module): path for path, module in modules.items()}

    def recorded(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            path = paths.get(id(module))
            if path is None:
                return original(module, *args, **kwargs)
            if path in calls.outputs:
                outputs = original(module, *args, **kwargs)
            else:
                with calls.record(path, original, module, (args, kwargs)):
                    outputs = original(module, *args, **kwargs)
            calls.record_outputs(path, outputs)
            return outputs

        return call

    classes: set[Any] = {type(module) for module in modules.values() if callable(module)}
    with _RECORDING, ExitStack() as restored:
        for cls in classes:
            restored.callback(_restore_call, cls, vars(cls).get("__call__"))
            cls.__call__ = recorded(cls.__call__)
        yield


def _restore_call(cls: Any, own: Any) -> None:
    if own is None:
        del cls.__call__
    else:
        cls.__call__ = own

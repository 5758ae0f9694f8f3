"""What the model table says of a model: outputs in words, FLOPs, and whose each array is."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import jax

from distaff.errors import leaf_name
from distaff.models.adapter import LayerRow, Model, Variables
from distaff.typing import Key

Path = tuple[str, ...]

_RECORDING = threading.RLock()


def describe(outputs: Any) -> str:
    """Returns shapes and dtypes of what a module returns, such as `float32[64,8,8,32]`."""
    leaves = [leaf for leaf in jax.tree.leaves(outputs) if hasattr(leaf, "shape")]
    return ", ".join(f"{leaf.dtype}{list(leaf.shape)}".replace(" ", "") for leaf in leaves)


def flops(function: Callable[..., Any], *arguments: Any) -> float | None:
    """Returns XLA's estimate for one call, before it optimizes; None where there is none."""
    try:
        analysis = jax.jit(function).lower(*arguments).cost_analysis()
    except Exception:  # Some modules work within their parent alone, some backends do not count.
        return None
    return None if analysis is None else analysis.get("flops", 0.0)


def by_module(variables: Any, modules: Collection[Path]) -> dict[Path, list[Any]]:
    """Gives each array to the deepest called module whose path its own path starts with."""
    owned: dict[Path, list[Any]] = {}
    for path, leaf in jax.tree.leaves_with_path(variables):
        collection, *names = leaf_name(path).split("/")
        depths = range(len(names) - 1, -1, -1)
        depth = next((n for n in depths if tuple(names[:n]) in modules), 0)
        row = (collection, "/".join(names[depth:]), tuple(leaf.shape), leaf.dtype)
        owned.setdefault(tuple(names[:depth]), []).append(row)
    return owned


def listed(
    variables: Variables,
    kinds: Mapping[Path, str],
    outputs: Mapping[Path, str],
    flops: float | None,
) -> list[LayerRow]:
    """Returns the rows of a model: the modules that were called, and those that have arrays.

    Args:
        variables: the model's arrays, or what stands for them.
        kinds: the class's name of each module, by path.
        outputs: of the modules that were called, in order of call, as `describe` words them.
        flops: of the whole model in one evaluation; the first row has them.
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
            None if path else flops,
        )
        for path in paths
    ]


def listed_calls(
    model: Model,
    opened: Callable[[Variables, Key], tuple[Mapping[Path, Any], Callable[..., Any]]],
    key: Key,
    inputs: tuple[Any, ...],
    outputs_of: Callable[[Any], Any] = lambda result: result,
) -> list[LayerRow]:
    """Returns the rows of a model in order of call, by abstract evaluation.

    Args:
        model: its `init` needs no inputs.
        opened: gives, for variables and a key, the modules by path, and a function of the inputs
            that calls them, as in training, and returns the model's outputs.
        key: shapes of a key are enough.
        inputs: of the model, or their shapes, `[batch, ...]`.
        outputs_of: gives what is shown of what a module returns.
    """
    outputs: dict[Path, str] = {}
    kinds: dict[Path, str] = {}

    def forward(variables: Variables, key: Key, *inputs: Any) -> None:
        modules, call = opened(variables, key)
        kinds.update({path: type(each).__name__ for path, each in modules.items()})
        with _recorded_calls(modules, outputs_of) as seen:
            result = call(*inputs)
        outputs.update(seen | {(): describe(result)})

    def evaluate(variables: Variables, key: Key, *inputs: Any) -> Any:
        return model.apply(variables, *inputs, train=False, key=key)[0]

    variables = jax.eval_shape(model.init, key)
    jax.eval_shape(forward, variables, key, *inputs)
    return listed(variables, kinds, outputs, flops(evaluate, variables, key, *inputs))


@contextmanager
def _recorded_calls(
    modules: Mapping[Path, Any], outputs_of: Callable[[Any], Any]
) -> Generator[dict[Path, str]]:
    """Notes what modules return, for libraries that do not say when one is called.

    While it is open, `__call__` of their classes is another; only one thread can have it open.

    Args:
        modules: by path.
        outputs_of: gives what is shown of what a module returns.

    Yields:
        Outputs as `describe` words them, by path in order of call.
    """
    paths = {id(module): path for path, module in modules.items()}
    seen: dict[Path, str] = {}

    def noting(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            path = paths.get(id(module))
            if path is not None:
                seen.setdefault(path, "")
            outputs = original(module, *args, **kwargs)
            if path is not None:
                seen[path] = describe(outputs_of(outputs))
            return outputs

        return call

    classes: set[Any] = {type(module) for module in modules.values() if callable(module)}
    with _RECORDING, ExitStack() as restored:
        for cls in classes:
            restored.callback(_put_back, cls, vars(cls).get("__call__"))
            cls.__call__ = noting(cls.__call__)
        yield seen


def _put_back(cls: Any, own: Any) -> None:
    if own is None:
        del cls.__call__
    else:
        cls.__call__ = own

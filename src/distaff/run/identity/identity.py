"""The identity of a run, as recorded in `config.json`.

It holds digests of the parts of the training step, of the evaluation and of the data, and a sketch
of the initial weights. `distaff.run.identity.comparison` compares two of them.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distaff.core.digest import REST, digest, program_digest, sample_digest
from distaff.core.typing import Batch
from distaff.data import Loader, num_batches
from distaff.errors import leaf_name
from distaff.execution.placement import unplaced
from distaff.run.identity.sketch import sketch
from distaff.step.normalise import StepFn
from distaff.step.state import TrainState
from distaff.step.step import EvalFn

_NOT_WEIGHTS = ("opt_state", "guard", "step")
_LIBRARIES = ("jax", "flax", "optax", "equinox")


class Subject(NamedTuple):
    """The source of a run's identity, collected before its first step.

    Attributes:
        step: the training step without a guard; None if it is not traced.
        eval_step: the evaluation step; None if it is not traced.
        state: the initial state, with its optimizer.
        loaders: loaders with their first batches, by name: `train` and `val` or `val_clean`.
        total_steps: steps of the run; None if unknown.
        with_total_steps: returns the state with the optimizer for another number of steps.
        has_weights: whether the initial weights are known.
    """

    step: StepFn | None
    eval_step: EvalFn | None
    state: TrainState
    loaders: Mapping[str, tuple[Loader, Batch]]
    total_steps: int | None
    with_total_steps: Callable[[int | None], TrainState]
    has_weights: bool = True

    def identity(self) -> dict[str, Any]:
        """Returns the identity as strict JSON, with None for what cannot be traced."""
        evaluated = [batch for name, (_, batch) in self.loaders.items() if name != "train"]
        evaluation = None
        if self.eval_step is not None and evaluated:
            evaluation = _traced(self.eval_step, self.state, evaluated[0])
        return {
            "versions": _versions(),
            "total_steps": self.total_steps,
            "step": self.step_for(self.total_steps),
            "evaluation": None if evaluation is None else evaluation["whole"],
            "data": {name: _data(*each) for name, each in self.loaders.items()},
            "weights": _weights(self.state) if self.has_weights else None,
        }

    def step_for(self, total_steps: int | None) -> dict[str, Any] | None:
        """Returns the digests of the training step and its parts for a number of steps.

        The optimizer's initial state counts as a part of the optimizer.
        """
        is_own = total_steps == self.total_steps
        state = self.state if is_own else self.with_total_steps(total_steps)
        found = None if self.step is None else _traced(self.step, state, self.loaders["train"][1])
        start = None if state.tx is None else _traced(state.tx.init, state.params)
        if found is None or start is None:
            return found
        parts = found["parts"]
        own, begun = (
            each.get(name, _NO_PART)
            for each, name in ((parts, "optimizer"), (start["parts"], REST))
        )
        parts["optimizer"] = {
            "form": digest(own["form"], begun["form"]),
            "whole": digest(own["whole"], start["whole"]),
            "numbers": list(dict.fromkeys([*own["numbers"], *begun["numbers"]])),
        }
        return {"whole": digest(found["whole"], start["whole"]), "parts": parts}


_NO_PART = {"form": "", "whole": "", "numbers": []}


def _versions() -> dict[str, str]:
    modules = {name: sys.modules[name] for name in _LIBRARIES if name in sys.modules}
    found = {name: str(getattr(each, "__version__", "")) for name, each in modules.items()}
    return {"python": platform.python_version(), **found, "distaff": version("distaff")}


def _traced(function: Callable[..., Any], *arguments: Any) -> dict[str, Any] | None:
    """Returns the digest of a function as JSON; None if it cannot be traced."""
    try:
        found = program_digest(function, *unplaced(arguments))
    except Exception:  # the user's; it is raised again when the function runs
        return None
    parts = {
        name: {"form": part.form, "whole": part.whole, "numbers": list(part.numbers)}
        for name, part in found.parts.items()
    }
    return {"whole": found.whole, "parts": parts}


def _data(loader: Loader, batch: Batch) -> dict[str, Any]:
    leaves = jax.tree.leaves_with_path(batch)
    return {
        "kind": " of ".join(type(each).__qualname__ for each in _chain(loader)),
        "length": num_batches(loader),
        "batch": {leaf_name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves},
        "facts": [_facts(each) for each in _chain(loader)],
        "position": digest(loader.get_state()),
        "first": digest(*(sample_digest(leaf) for _, leaf in leaves)),
    }


def _chain(loader: Any) -> list[Any]:
    """Returns a loader, followed by the loaders that it wraps."""
    inner = getattr(loader, "loaders", None)
    inner = inner if isinstance(inner, tuple) else (getattr(loader, "loader", None),)
    found = [_chain(each) for each in inner if isinstance(each, Loader)]
    return [loader, *(each for chain in found for each in chain)]


def _facts(loader: Any) -> dict[str, Any]:
    identity = getattr(loader, "identity", None)
    found = identity() if callable(identity) else None
    return dict(found) if isinstance(found, Mapping) else {}


def _weights(state: TrainState) -> dict[str, str] | None:
    """Returns a digest of the names and shapes of the initial weights, and a sketch of them."""
    members = {n: x for n, x in state.arrays().items() if n not in _NOT_WEIGHTS}
    leaves = jax.tree.leaves_with_path(members)
    forms = [(leaf_name(path), jnp.shape(x), str(jnp.result_type(x))) for path, x in leaves]
    try:
        return {"form": digest(forms), "sketch": sketch([leaf for _, leaf in leaves])}
    except (TypeError, ValueError):  # a leaf of a type that NumPy does not support
        return None

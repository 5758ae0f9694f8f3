"""Finds where a number of a bad step became NaN or infinite.

It runs after a run has failed, from the state before the step and its batch. The step is executed
again several times, including its side effects, such as printing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.typing import Batch
from distaff.execution.placement import ONE_DEVICE, like
from distaff.run.diagnosis.origin import Origin, origin_of
from distaff.run.diagnosis.outcome import (
    Outcome,
    call,
    is_bad,
    named,
    outcome_of,
    runnable,
    without_donation,
)
from distaff.step.finite import new_bad
from distaff.step.normalise import StepFn
from distaff.step.state import TrainState, strongly_typed

_log = logging.getLogger("distaff")

_SHOWN = 3
_SHOWN_EXAMPLES = 5


class Finding(NamedTuple):
    """Where a number of a step became NaN or infinite. All of it is strict JSON.

    Attributes:
        where: `"the batch"`, `"the state"` (before the step), `"the forward pass"`,
            `"the gradient"` or `"the update"`; `"the step"` if these cannot be distinguished.
        names: names of the leaves that are not finite. For the forward pass, the scope of the
            responsible operation, such as `"MLP/Dense_0"`, or `"loss"` if it has none.
        text: the whole finding in one or more sentences.
        operation: JAX name of the responsible operation, such as `"log"`; empty if unknown.
        line: the line of the user's code with the operation, such as `"model.py:31"`; or empty.
    """

    where: str
    names: tuple[str, ...]
    text: str
    operation: str = ""
    line: str = ""


class Replayed(NamedTuple):
    """The first bad step of several.

    Attributes:
        index: index of its batch, from 0.
        state: the state before the step.
        batch: the batch of the step.
    """

    index: int
    state: TrainState
    batch: Batch


def diagnose(
    step: StepFn, state: TrainState, batch: Batch, *, max_seconds: float = 300.0
) -> Finding | None:
    """Finds where a number of a step became NaN or infinite. Never raises.

    A step is bad if the metric "loss" is not finite, or a float of the new state is not finite but
    was before. The computation is traced back one operation at a time, to an operation or to an
    entry of the batch or the state. A batch is not blamed if replacing the entry does not help.

    Args:
        step: a pure `(state, batch) -> (state, metrics)`, preferably not compiled.
        state: the state before the step. It is not donated.
        batch: the batch of the step.
        max_seconds: time limit for tracing back. Afterwards only leaves are named, no operation.

    Returns:
        The finding; None if the step is good or fails when it runs again, or if other processes
        hold parts of the arrays.
    """
    deadline = time.monotonic() + max_seconds
    try:
        with _values_allowed():
            return _diagnosed(step, state, batch, deadline)
    except Exception:
        _log.debug("A step could not be diagnosed.", exc_info=True)
        return None


def replay(
    step: StepFn, state: TrainState, batches: Iterable[Batch], *, max_seconds: float
) -> Replayed | None:
    """Runs steps one by one up to the first bad one; see `diagnose`. Never raises.

    Returns:
        The bad step; None if all are good, the time is up, or something fails.
    """
    deadline = time.monotonic() + max_seconds
    try:
        with _values_allowed():
            return _replayed(step, state, batches, deadline)
    except Exception:
        _log.debug("Steps could not be run again.", exc_info=True)
        return None


def _replayed(
    step: StepFn, state: TrainState, batches: Iterable[Batch], deadline: float
) -> Replayed | None:
    def program(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        after, metrics = without_donation(step)(state, batch)
        loss = metrics.get("loss") if isinstance(metrics, Mapping) else None
        return strongly_typed(after), new_bad(state, after) | is_bad(loss)

    run = None
    for index, batch in enumerate(batches):
        if run is None:
            state = ONE_DEVICE.alongside(batch).state(state)
            run = runnable(program, state, batch)
        if time.monotonic() >= deadline:
            return None
        after, bad = run(state, batch)
        if bad:
            return Replayed(index, state, batch)
        state = after
    return None


@contextmanager
def _values_allowed() -> Generator[None]:
    with jax.transfer_guard("allow"), jax.debug_nans(False), jax.debug_infs(False):
        yield


def _diagnosed(step: StepFn, state: TrainState, batch: Batch, deadline: float) -> Finding | None:
    arrays = [leaf for leaf in jax.tree.leaves((state, batch)) if isinstance(leaf, jax.Array)]
    if not all(array.is_fully_addressable for array in arrays):
        return None
    state = ONE_DEVICE.alongside(batch).state(state)
    finding = _found(step, state, batch, deadline)
    if finding is None or finding.where != "the batch":
        return finding
    # The loss may mask NaN in the batch on purpose.
    mended = _mended(batch)
    other = None if mended is None else _found(step, state, mended, deadline)
    if other is None:
        return finding
    text = f"{other.text} {finding.text} Replacing these values does not help."
    return other._replace(text=text)


def _found(step: StepFn, state: TrainState, batch: Batch, deadline: float) -> Finding | None:
    outcome = outcome_of(step, state, batch)
    bad = outcome.first_bad()
    if not bad:
        return None
    given = {"state": state, "batch": batch}
    try:
        origin = origin_of(
            lambda state, batch: outcome.recompute(bad, state, batch), given, deadline=deadline
        )
    except Exception:  # including lack of time or memory
        _log.debug("The origin of a number could not be found.", exc_info=True)
        origin = None
    suspects = _suspects(named(given), origin)
    return _in_given(suspects) if suspects else _in_step(outcome, bad, origin)


def _suspects(given: Mapping[str, Any], origin: Origin | None) -> dict[str, Any]:
    """Returns the inputs responsible for a bad result; those that may be, without an origin."""
    argument = "" if origin is None else origin.root.argument
    if origin is not None and not argument.startswith("batch"):
        return {argument: given[argument]} if argument else {}
    bad = {name: leaf for name, leaf in given.items() if not np.isfinite(_floats(leaf)).all()}
    in_batch = sorted((name for name in bad if name.startswith("batch")), key=argument.__ne__)
    if in_batch:
        return {name: bad[name] for name in in_batch}
    finite = ("state/params/", "state/batch_stats/")  # Other leaves may contain inf on purpose.
    return {n: x for n, x in bad.items() if n.startswith(finite) or np.isnan(_floats(x)).any()}


def _in_given(suspects: Mapping[str, Any]) -> Finding:
    names = tuple(_short(name) for name in suspects)
    texts = [_holding(name, leaf) for name, leaf in [*suspects.items()][:_SHOWN]]
    where = "the batch" if next(iter(suspects)).startswith("batch") else "the state"
    return Finding(where, names, " ".join(texts))


def _in_step(outcome: Outcome, bad: Sequence[str], origin: Origin | None) -> Finding:
    names = tuple(_short(name) for name in bad)
    if bad[0].startswith("metrics/"):
        where, text = "the forward pass", "The loss is not finite."
        names = ((origin.root.scope if origin else "") or "loss",)
    elif bad[0].startswith("gradients/"):
        where, text = "the gradient", _of_gradient(outcome, bad)
    else:
        where, text = _of_state(outcome, bad)
    if origin is None:
        return Finding(where, names, text)
    root = origin.root
    return Finding(where, names, f"{text} It comes from {origin}.", root.operation, root.line)


def _of_gradient(outcome: Outcome, bad: Sequence[str]) -> str:
    place = call(bad[0])
    optimizer = place.split("/")[2]
    which = "" if optimizer == "tx" else f" passed to {optimizer}"
    leaves = f"({len(bad)} of {len(outcome.all_of(place))} leaves)"
    loss = "; the loss is" * bool(outcome.all_of("metrics/loss"))
    return f"The gradient{which} is not finite in {_listed(bad)} {leaves}{loss}.{_metrics(outcome)}"


def _of_state(outcome: Outcome, bad: Sequence[str]) -> tuple[str, str]:
    where = "the update" if outcome.all_of("gradients") else "the step"
    if all(name.startswith(("state/batch_stats/", "state/collections/")) for name in bad):
        where = "the forward pass"
    leaves = f"({len(bad)} of {len(outcome.all_of('state'))} leaves of the state)"
    kinds = {"the loss": "metrics/loss", "the gradient": "gradients"}
    good = [what for what, kind in kinds.items() if outcome.all_of(kind)]
    rest = f"; {' and '.join(good)} {'is' if len(good) == 1 else 'are'}" if good else ""
    makes = f"{where[0].upper()}{where[1:]} makes"
    return where, f"{makes} {_listed(bad)} not finite {leaves}{rest}.{_metrics(outcome)}"


def _metrics(outcome: Outcome) -> str:
    names = list(dict.fromkeys(name.split("/")[1] for name in outcome.bad_of("metrics")))
    if not names:
        return ""
    verb = "metric {} is" if len(names) == 1 else "metrics {} are"
    return f" The {verb.format(_listed(names))} not finite either."


def _holding(name: str, leaf: Any) -> str:
    bad = ~np.isfinite(_floats(leaf))
    count = int(bad.sum())
    numbers = f"{count} non-finite value{'s' * (count > 1)}"
    if name.startswith("state"):
        return f"Before the step, the state has {numbers} in {_short(name)!r}."
    examples = np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1)) if bad.ndim else []
    shown = ", ".join(map(str, examples[:_SHOWN_EXAMPLES]))
    more = len(examples) - _SHOWN_EXAMPLES
    which = f", in example{'s' * (len(examples) > 1)} {shown}" if shown else ""
    which += f" and {more} more" * (more > 0)
    return f"The batch has {numbers} in {_short(name)!r}{which}."


def _mended(batch: Batch) -> Batch | None:
    """Replaces non-finite values by the median of their leaf; None if it has no finite values."""

    def mended(leaf: Any) -> Any:
        numbers = _floats(leaf)
        good = np.isfinite(numbers)
        if good.all():
            return leaf
        numbers = np.where(good, numbers, np.sort(numbers[good])[good.sum() // 2])
        return like(numbers.astype(leaf.dtype), leaf)

    try:
        return jax.tree.map(mended, batch)
    except IndexError:
        return None


def _floats(leaf: Any) -> np.ndarray:
    """Returns the floats of a leaf as a step sees them, in 64 bits; zeros for other types."""
    array = jnp.asarray(leaf)
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return np.zeros(array.shape)
    is_complex = jnp.issubdtype(array.dtype, jnp.complexfloating)
    return np.asarray(array).astype(np.complex128 if is_complex else np.float64)


def _short(name: str) -> str:
    """Returns the user's name of a leaf: `Dense_0/bias` for `gradients/0/tx/Dense_0/bias`."""
    if name.startswith("gradients/"):
        return name.removeprefix(f"{call(name)}/")
    return name.partition("/")[2] or name


def _listed(names: Sequence[str]) -> str:
    shown = [repr(_short(name)) for name in names[:_SHOWN]]
    if len(names) > _SHOWN:
        return f"{', '.join(shown)} and {len(names) - _SHOWN} more"
    return " and ".join([", ".join(shown[:-1])] * (len(shown) > 1) + shown[-1:])

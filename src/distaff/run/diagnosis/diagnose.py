"""Diagnosis: where, in a step that has gone wrong, a number became NaN or infinite.

It is made after a run has failed, from the state before the step and its batch. The step runs again
several times, and whatever it does beside computing (printing, say) it does again.
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
from distaff.run.diagnosis.outcome import Outcome, call, is_bad, kept, named, outcome_of, runnable
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
            `"the gradient"` or `"the update"`; `"the step"` where these cannot be told apart.
        names: of the leaves of it that are not finite; of the forward pass, the scope of the
            operation that made the number, such as `"MLP/Dense_0"`, or `"loss"` if there is none.
        text: all that was found, in a sentence or more.
        operation: what made the number, as JAX calls it: `"log"`; empty where it is not known.
        line: of the user's code that the operation is in, such as `"model.py:31"`; or empty.
    """

    where: str
    names: tuple[str, ...]
    text: str
    operation: str = ""
    line: str = ""


class Replayed(NamedTuple):
    """The first bad step among several.

    Attributes:
        index: its position among the batches, from 0.
        state: the state before it.
        batch: its batch.
    """

    index: int
    state: TrainState
    batch: Batch


def diagnose(
    step: StepFn, state: TrainState, batch: Batch, *, max_seconds: float = 300.0
) -> Finding | None:
    """Says where a number of a step became NaN or infinite.

    The step is bad if a float of the new state is not finite that was before, or the metric "loss"
    is not finite. From there it goes back along the computation, one operation at a time, to what
    has made the number: an entry of the batch or the state, or an operation. A batch is not blamed
    if the step is bad with other numbers in those places, too.

    Args:
        step: a pure `(state, batch) -> (state, metrics)`, best not yet compiled.
        state: the state before the step. It is not given away.
        batch: the batch of the step.
        max_seconds: time for going back. Once it is over, leaves are named, but no operation.

    Returns:
        The finding; None where the step is a good one when it runs again, where it fails, and where
        other processes hold a part of the arrays. It raises nothing.
    """
    deadline = time.monotonic() + max_seconds
    try:
        with _plainly():
            return _diagnosed(step, state, batch, deadline)
    except Exception:
        _log.debug("A step could not be diagnosed.", exc_info=True)
        return None


def replay(
    step: StepFn, state: TrainState, batches: Iterable[Batch], *, max_seconds: float
) -> Replayed | None:
    """Runs steps one by one, up to the first bad one; see `diagnose`.

    Args:
        step: as for `diagnose`.
        state: the state before the first step. It is not given away.
        batches: their batches.
        max_seconds: no step begins after that.

    Returns:
        The bad step; None where there is none, where time is up, and where something fails. It
        raises nothing.
    """
    deadline = time.monotonic() + max_seconds
    try:
        with _plainly():
            return _replayed(step, state, batches, deadline)
    except Exception:
        _log.debug("Steps could not be run again.", exc_info=True)
        return None


def _replayed(
    step: StepFn, state: TrainState, batches: Iterable[Batch], deadline: float
) -> Replayed | None:
    def program(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        after, metrics = kept(step)(state, batch)
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
def _plainly() -> Generator[None]:
    """Lets values be fetched, and NaN be computed."""
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
    # NaN may be in the batch on purpose, for the loss to mask.
    mended = _mended(batch)
    other = None if mended is None else _found(step, state, mended, deadline)
    if other is None:
        return finding
    text = f"{other.text} {finding.text} With other numbers there the step is bad all the same."
    return other._replace(text=text)


def _found(step: StepFn, state: TrainState, batch: Batch, deadline: float) -> Finding | None:
    outcome = outcome_of(step, state, batch)
    bad = outcome.first_bad()
    if not bad:
        return None
    given = {"state": state, "batch": batch}
    try:
        origin = origin_of(
            lambda state, batch: outcome.again(bad, state, batch), given, deadline=deadline
        )
    except Exception:  # also for lack of time or memory
        _log.debug("Where a number was made could not be found.", exc_info=True)
        origin = None
    suspects = _suspects(named(given), origin)
    return _in_given(suspects) if suspects else _in_step(outcome, bad, origin)


def _suspects(given: Mapping[str, Any], origin: Origin | None) -> dict[str, Any]:
    """Returns what the step was given that made its result bad; unproven without an origin."""
    argument = "" if origin is None else origin.root.argument
    if origin is not None and not argument.startswith("batch"):
        return {argument: given[argument]} if argument else {}
    bad = {name: leaf for name, leaf in given.items() if not np.isfinite(_floats(leaf)).all()}
    in_batch = sorted((name for name in bad if name.startswith("batch")), key=argument.__ne__)
    if in_batch:
        return {name: bad[name] for name in in_batch}
    finite = ("state/params/", "state/batch_stats/")  # Elsewhere inf may be as it should.
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
    which = "" if optimizer == "tx" else f" that {optimizer} is given"
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
    return f" Nor {'is the metric' if len(names) == 1 else 'are the metrics'} {_listed(names)}."


def _holding(name: str, leaf: Any) -> str:
    bad = ~np.isfinite(_floats(leaf))
    count = int(bad.sum())
    numbers = "a number that is" if count == 1 else f"{count} numbers that are"
    if name.startswith("state"):
        return f"Before the step the state holds {numbers} not finite in {_short(name)!r}."
    examples = np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1)) if bad.ndim else []
    shown = ", ".join(map(str, examples[:_SHOWN_EXAMPLES]))
    more = len(examples) - _SHOWN_EXAMPLES
    which = f", in example{'s' * (len(examples) > 1)} {shown}" if shown else ""
    which += f" and {more} more" * (more > 0)
    return f"The batch holds {numbers} not finite in {_short(name)!r}{which}."


def _mended(batch: Batch) -> Batch | None:
    """Returns a batch with other numbers of a leaf in place of what is not finite in it.

    None where a leaf has no other numbers.
    """

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
    """Returns the floats of a leaf as a step sees them, in 64 bits; zeros for what is none."""
    array = jnp.asarray(leaf)
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return np.zeros(array.shape)
    is_complex = jnp.issubdtype(array.dtype, jnp.complexfloating)
    return np.asarray(array).astype(np.complex128 if is_complex else np.float64)


def _short(name: str) -> str:
    """Returns a name as the user knows it: of `gradients/0/tx/Dense_0/bias`, `Dense_0/bias`."""
    if name.startswith("gradients/"):
        return name.removeprefix(f"{call(name)}/")
    return name.partition("/")[2] or name


def _listed(names: Sequence[str]) -> str:
    shown = [repr(_short(name)) for name in names[:_SHOWN]]
    if len(names) > _SHOWN:
        return f"{', '.join(shown)} and {len(names) - _SHOWN} more"
    return " and ".join([", ".join(shown[:-1])] * (len(shown) > 1) + shown[-1:])

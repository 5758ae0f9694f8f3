"""Training loops written by hand, as well as we can: the measure that Distaff is held to.

They take the same model, optimizer, batches and order as Distaff does, and write the same log. They
have no progress display, no checkpoints and no check for NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.log import MetricLog
from benchmarks.models import (
    initial_variables,
    losses,
    make_model,
    make_optimizer,
    without_distaff,
)
from benchmarks.worker import Rounds
from benchmarks.workloads import LOG_EVERY, Workload, epoch_rows, make_arrays


def loop(workload: Workload, rounds: Rounds, folder: Path) -> None:
    """One jitted, donated step per batch; metrics are added up on the device and read late."""
    inputs, labels = make_arrays(workload)
    update, state = make_update(workload, inputs)
    log, zeros = MetricLog(folder), jnp.zeros(2)

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, sums: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        state, metrics = update(state, x, y)
        return state, sums + metrics

    done = 0
    for epoch in rounds:
        sums, count, closed = zeros, 0, None
        for rows in epoch_rows(workload, epoch):
            state, sums = step(state, sums, inputs[rows], labels[rows])
            done, count = done + 1, count + 1
            if closed is not None:  # the device has the next step already
                log.add_sum(*closed)
                closed = None
            if done % LOG_EVERY == 0:
                closed, sums, count = (sums, count), zeros, 0
        for last in (closed, (sums, count)):
            if last is not None and last[1]:
                log.add_sum(*last)
        jax.block_until_ready(state)
        rounds.done(log.end_round())


def loop_float(workload: Workload, rounds: Rounds, folder: Path) -> None:
    """One jitted, donated step per batch, whose loss and accuracy are read at once."""
    inputs, labels = make_arrays(workload)
    update, state = make_update(workload, inputs)
    step, log = jax.jit(update, donate_argnums=0), MetricLog(folder)
    for epoch in rounds:
        for rows in epoch_rows(workload, epoch):
            state, metrics = step(state, inputs[rows], labels[rows])
            log.add(np.asarray(metrics)[None])
        jax.block_until_ready(state)
        rounds.done(log.end_round())


def scan(workload: Workload, rounds: Rounds, folder: Path, *, unroll: bool) -> None:
    """Many steps per program, over batches that are on the device before the clock starts."""
    inputs, labels = make_arrays(workload)
    update, state = make_update(workload, inputs)
    log, steps = MetricLog(folder), workload.unrolled if unroll else workload.scan

    @partial(jax.jit, donate_argnums=0)
    def many(state: Any, batches: Any) -> Any:
        return jax.lax.scan(
            lambda state, batch: update(state, *batch),
            state,
            batches,
            unroll=steps if unroll else 1,
        )

    for epoch in rounds:
        chunks = [
            jax.device_put((inputs[rows], labels[rows]))
            for rows in np.split(epoch_rows(workload, epoch), workload.steps // steps)
        ]
        jax.block_until_ready(chunks)
        rounds.start()
        waiting: list[jax.Array] = []
        for chunk in chunks:
            state, metrics = many(state, chunk)
            if len(waiting) * steps >= LOG_EVERY:
                _read(log, waiting)
            waiting.append(metrics)
        _read(log, waiting)
        jax.block_until_ready(state)
        rounds.done(log.end_round())


def _read(log: MetricLog, waiting: list[jax.Array]) -> None:
    for rows in jax.device_get(waiting):
        log.add(rows)
    waiting.clear()


def make_update(workload: Workload, inputs: np.ndarray) -> tuple[Callable[..., Any], Any]:
    """Returns one update as a pure function, and the state it starts from.

    Returns:
        `(state, x, y) -> (state, [loss, accuracy])`, and
        `(params, other variables, optimizer state)`.
    """
    without_distaff()
    model, tx = make_model(workload), make_optimizer(workload)
    others = initial_variables(model, inputs[: workload.batch_size])
    params = others.pop("params")

    def loss_fn(params: Any, others: Any, x: jax.Array, y: jax.Array) -> Any:
        logits, others = model.apply({"params": params, **others}, x, mutable=list(others))
        loss, accuracy = losses(logits, y)
        return loss.mean(), (accuracy.mean(), others)

    def update(state: Any, x: jax.Array, y: jax.Array) -> Any:
        params, others, opt_state = state
        (loss, (accuracy, others)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, others, x, y
        )
        updates, opt_state = tx.update(grads, opt_state, params)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
        return (params, others, opt_state), jnp.stack([loss, accuracy])

    return update, (params, others, tx.init(params))

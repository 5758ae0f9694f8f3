"""One pass over a data set: mean loss and accuracy over every example, the short last batch too."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.models import initial_variables, losses, make_model, without_distaff
from benchmarks.worker import Rounds
from benchmarks.workloads import WORKLOADS, Workload, digits

_EXAMPLES, _TRAINED = 30_000, WORKLOADS["W1"]


def _hand_made() -> tuple[Any, Any]:
    without_distaff()
    model = make_model(_TRAINED)
    variables = initial_variables(model, np.zeros((64, 64), np.float32))

    def measure(variables: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.stack(losses(model.apply(variables, x), y))  # [2, batch]

    return measure, variables


def loop(workload: Workload, rounds: Rounds, folder: Path) -> None:
    """A jitted step per NumPy batch, whose sums are added up on the device."""
    measure, variables = _hand_made()
    inputs, labels = digits(_EXAMPLES)

    @jax.jit
    def step(sums: jax.Array, variables: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return sums + measure(variables, x, y).sum(axis=1)

    for _ in rounds:
        sums = jnp.zeros(2)
        for start in range(0, _EXAMPLES, workload.batch_size):
            rows = slice(start, start + workload.batch_size)
            sums = step(sums, variables, inputs[rows], labels[rows])
        rounds.done(np.asarray(sums)[0] / _EXAMPLES)


def scan(workload: Workload, rounds: Rounds, folder: Path) -> None:
    """One program over batches that are on the device before the clock starts: the limit."""
    measure, variables = _hand_made()
    missing = workload.steps * workload.batch_size - _EXAMPLES
    inputs, labels = (np.concatenate([a, a[:missing]]) for a in digits(_EXAMPLES))
    counted = np.arange(len(labels)) < _EXAMPLES
    batches = jax.device_put(
        [a.reshape(workload.steps, -1, *a.shape[1:]) for a in (inputs, labels, counted)]
    )

    @jax.jit
    def everything(variables: Any, batches: Any) -> jax.Array:
        def body(sums: jax.Array, batch: Any) -> Any:
            x, y, counted = batch
            return sums + (measure(variables, x, y) * counted).sum(axis=1), None

        return jax.lax.scan(body, jnp.zeros(2), batches)[0]

    for _ in rounds:
        rounds.done(np.asarray(everything(variables, batches))[0] / _EXAMPLES)


def distaff_eval(workload: Workload, rounds: Rounds, folder: Path) -> None:
    """`eval_model` of a trainer that has trained, and so knows how many steps suit a program."""
    import distaff
    from benchmarks.systems.distaff_system import Benched

    class Trained(Benched):
        train_epoch = distaff.TrainerModule.train_epoch

    # Updates are zero, so that it evaluates the variables of the other forms; Distaff warns of it.
    warnings.filterwarnings("ignore", "No parameter has changed")
    trainer = Trained(make_model(_TRAINED), optimizer=optax.set_to_zero(), root=str(folder))
    inputs, labels = digits(_EXAMPLES)
    loader = distaff.data.ArrayLoader({"x": inputs, "y": labels}, workload.batch_size)
    trainer.train_model(loader, num_epochs=6)
    for _ in rounds:
        rounds.done(trainer.eval_model(loader, "val/")["val/loss"])

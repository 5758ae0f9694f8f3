"""Distaff with its defaults: progress display, JSON log, check for NaN and checkpoints are on.

A round is one `train_epoch`, with everything that the loop does in it: feeding, steps, metrics, log
lines, the display, and the wait for the device at the end. Out of it, between two rounds, are the
end of the epoch and its checkpoint, which is written in the background: it would slow the other
systems' rounds. What the end of an epoch keeps the trainer busy for is measured beside it, as
`epoch_end_seconds`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import distaff
from benchmarks.models import initial_variables, losses, make_model, make_optimizer
from benchmarks.systems.distaff_round import RoundedEpochs, train_rounds
from benchmarks.worker import Rounds
from benchmarks.workloads import LOG_EVERY, Workload, make_arrays
from distaff.models import Variables


class Benched(RoundedEpochs):
    """Trains the model of a workload."""

    def loss_fn(self, params: Any, batch: Any, ctx: distaff.Context) -> Any:
        """Returns the loss of each example, and its accuracy."""
        loss, accuracy = losses(ctx.apply(params, batch["x"]), batch["y"])
        return loss, {"accuracy": accuracy}

    def run_model_init(self, example_batch: Any, key: Any) -> Variables:
        """Returns the variables that the hand-written loops start from."""
        collections = initial_variables(self.model.module, example_batch["x"])
        return Variables(collections["params"], collections.get("batch_stats"), None)


def run(workload: Workload, rounds: Rounds, folder: Path, **options: Any) -> None:
    """Trains rounds.

    Args:
        workload: what to train.
        rounds: says when.
        folder: the root of its run directory.
        **options: options of the trainer that differ from the defaults.
    """
    assert distaff.TrainerConfig().log_every_n_steps == LOG_EVERY
    trainer = Benched(
        make_model(workload), optimizer=make_optimizer(workload), root=str(folder), **options
    )
    inputs, labels = make_arrays(workload)
    loader = distaff.data.ArrayLoader(
        {"x": inputs, "y": labels}, workload.batch_size, shuffle=True, seed=0
    )
    train_rounds(trainer, rounds, loader)

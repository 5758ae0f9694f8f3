"""Distaff with its defaults: progress display, JSON log, check for NaN and checkpoints are on.

A round is one `train_epoch`, with everything that the loop does in it: feeding, steps, metrics, log
lines, the display, the choice between single and fused steps where it is still open, and the wait
for the device at the end. Out of it, between two rounds, are the end of the epoch and its
checkpoint, which is written in the background: it would slow the other systems' rounds. What the
end of an epoch keeps the trainer busy for is measured beside it, as `epoch_end_seconds`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax

import distaff
from benchmarks.models import initial_variables, losses, make_model, make_optimizer
from benchmarks.worker import Rounds
from benchmarks.workloads import LOG_EVERY, Workload, make_arrays
from distaff.models import Variables


class Benched(distaff.TrainerModule):
    """Trains the model of a workload; each epoch is a round."""

    rounds: Rounds

    def loss_fn(self, params: Any, batch: Any, ctx: distaff.Context) -> Any:
        """Returns the loss of each example, and its accuracy."""
        loss, accuracy = losses(ctx.apply(params, batch["x"]), batch["y"])
        return loss, {"accuracy": accuracy}

    def run_model_init(self, example_batch: Any, key: Any) -> Variables:
        """Returns the variables that the hand-written loops start from."""
        collections = initial_variables(self.model.module, example_batch["x"])
        return Variables(collections["params"], collections.get("batch_stats"), None)

    def train_epoch(self, train_loader: Any, epoch: int) -> dict[str, Any]:
        """Trains one round, by the clock."""
        self.rounds.start()
        metrics = super().train_epoch(train_loader, epoch)
        jax.block_until_ready(self.state)
        settled = not self.forms.measuring
        self.rounds.done(metrics["train/loss"], settled=settled, forms=self.forms.describe())
        self.epoch_end = time.perf_counter()
        return metrics


class Conversation(distaff.Callback):
    """Waits for the coordinator after each epoch, when its checkpoint is on the disk."""

    trainer: Benched

    def on_checkpoint(self, info: distaff.StepInfo) -> None:
        """Answers with the round, and stops the training when no more are wanted."""
        trainer = self.trainer
        trainer.rounds.note(epoch_end_seconds=time.perf_counter() - trainer.epoch_end)
        trainer.recording.store.wait()
        if not trainer.rounds.asked():
            raise distaff.StopTraining("all rounds are done")


def run(workload: Workload, rounds: Rounds, folder: Path, **options: Any) -> None:
    """Trains rounds.

    Args:
        workload: what to train.
        rounds: says when.
        folder: the root of its run directory.
        **options: those of the trainer that differ from the defaults.
    """
    assert distaff.TrainerConfig().log_every_n_steps == LOG_EVERY
    conversation = Conversation()
    trainer = Benched(
        make_model(workload),
        optimizer=make_optimizer(workload),
        root=str(folder),
        callbacks=[conversation],
        **options,
    )
    trainer.rounds, conversation.trainer = rounds, trainer
    inputs, labels = make_arrays(workload)
    loader = distaff.data.ArrayLoader(
        {"x": inputs, "y": labels}, workload.batch_size, shuffle=True, seed=0
    )
    if rounds.asked():
        trainer.train_model(loader, num_epochs=10_000)

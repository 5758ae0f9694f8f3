"""How a Distaff trainer keeps to the coordinator's rounds: one epoch is one round."""

from __future__ import annotations

import time
from typing import Any

import jax

import distaff
from benchmarks.worker import Rounds


class RoundedEpochs(distaff.TrainerModule):
    """A trainer whose every epoch is timed as a round."""

    rounds: Rounds

    def train_epoch(self, train_loader: Any, epoch: int) -> dict[str, Any]:
        """Trains one round, by the clock."""
        self.rounds.start()
        metrics = super().train_epoch(train_loader, epoch)
        jax.block_until_ready(self.state)
        self.rounds.done(metrics["train/loss"], forms=self.last_run.forms.describe())
        self.epoch_end = time.perf_counter()
        return metrics


class Conversation(distaff.Callback):
    """Waits for the coordinator after each epoch, when its checkpoint is on the disk."""

    trainer: RoundedEpochs

    def on_checkpoint(self, info: distaff.StepInfo) -> None:
        """Answers with the round, and stops the training when no more are wanted."""
        trainer = self.trainer
        trainer.rounds.note(epoch_end_seconds=time.perf_counter() - trainer.epoch_end)
        trainer.last_run.checkpointer.store.wait()
        if not trainer.rounds.asked():
            raise distaff.StopTraining("all rounds are done")


def train_rounds(trainer: RoundedEpochs, rounds: Rounds, loader: Any, **options: Any) -> None:
    """Trains for as many rounds as the coordinator wants.

    Args:
        trainer: made, not yet trained.
        rounds: says when.
        loader: an epoch of it is a round.
        **options: of `train_model`.
    """
    conversation = Conversation()
    conversation.trainer, trainer.rounds = trainer, rounds
    trainer.callbacks = distaff.callbacks.Callbacks([*trainer.callbacks.callbacks, conversation])
    if rounds.asked():
        trainer.train_model(loader, num_epochs=10_000, **options)

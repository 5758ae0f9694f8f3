"""PyTorch Lightning with its defaults: progress bar, logger and checkpoints are on.

A round is one epoch, from `on_train_epoch_start` to `on_train_epoch_end`. The data loader hands out
whole batches by index, in the order of every other system, without a worker: the fastest for data
in memory. `self.log` logs the value of every 50th step, which is cheaper than their mean.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.systems.torch_models import make_model, make_optimizer, measures, tensors
from benchmarks.worker import Rounds
from benchmarks.workloads import LOG_EVERY, Workload, epoch_rows, make_arrays


class Order:
    """Yields the rows of each batch; a new order in each epoch."""

    def __init__(self, workload: Workload) -> None:
        self._workload, self._epoch = workload, 0

    def __len__(self) -> int:
        return self._workload.steps

    def __iter__(self) -> Iterator[torch.Tensor]:
        rows = epoch_rows(self._workload, self._epoch)
        self._epoch += 1
        return iter(torch.from_numpy(rows))


class Module(lightning.LightningModule):
    """The model of a workload."""

    def __init__(self, workload: Workload, rounds: Rounds) -> None:
        super().__init__()
        self._workload, self._rounds = workload, rounds
        self.model = make_model(workload)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        """Returns the loss."""
        x, y = batch
        loss, accuracy = measures(self.model(x), y)
        self.log("loss", loss, prog_bar=True)
        self.log("accuracy", accuracy)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer."""
        return make_optimizer(self._workload, self)

    def on_train_epoch_start(self) -> None:
        """Starts the clock."""
        self._rounds.start()

    def on_train_epoch_end(self) -> None:
        """Stops the clock, and waits for the coordinator."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self._rounds.done(float(self.trainer.callback_metrics["loss"]))
        if not self._rounds.asked():
            self.trainer.should_stop = True


def run(workload: Workload, rounds: Rounds, folder: Path) -> None:
    """Trains rounds."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    lightning.seed_everything(0)
    data = TensorDataset(*tensors(workload, *make_arrays(workload)))
    loader = DataLoader(data, sampler=Order(workload), batch_size=None)
    trainer = lightning.Trainer(
        max_epochs=10_000,
        log_every_n_steps=LOG_EVERY,
        default_root_dir=folder,
        logger=CSVLogger(folder),
    )
    if rounds.asked():
        trainer.fit(Module(workload, rounds), loader)

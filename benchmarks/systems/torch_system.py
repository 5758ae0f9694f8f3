"""A plain PyTorch loop: eager, batches gathered by index from tensors on the device."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.log import MetricLog
from benchmarks.systems.torch_models import make_model, make_optimizer, measures, tensors
from benchmarks.worker import Rounds
from benchmarks.workloads import LOG_EVERY, Workload, epoch_rows, make_arrays


def run(workload: Workload, rounds: Rounds, folder: Path, *, threads: int | None = None) -> None:
    """Trains rounds; metrics are added up on the device and read every 50 steps.

    Args:
        workload: what to train.
        rounds: says when.
        folder: for the log.
        threads: of an operation; by default as many as there are cores. Where other processes run
            besides, or the model is small, one may be faster by far.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(workload).to(device)
    optimizer = make_optimizer(workload, model)
    inputs, labels = (t.to(device) for t in tensors(workload, *make_arrays(workload)))
    log, done, last = MetricLog(folder), 0, 0
    sums = torch.zeros(2, device=device)
    for epoch in rounds:
        for rows in torch.from_numpy(epoch_rows(workload, epoch)).to(device):
            optimizer.zero_grad()
            loss, accuracy = measures(model(inputs[rows]), labels[rows])
            loss.backward()
            optimizer.step()
            sums += torch.stack([loss.detach(), accuracy])
            done += 1
            if done % LOG_EVERY == 0:
                log.add_sum(sums.cpu().numpy(), done - last)
                last, sums = done, torch.zeros(2, device=device)
        if done > last:
            log.add_sum(sums.cpu().numpy(), done - last)
            last, sums = done, torch.zeros(2, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        rounds.done(log.end_round())

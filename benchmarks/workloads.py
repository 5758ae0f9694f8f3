"""What every system trains: four workloads, their data, and the order of their batches."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

LOG_EVERY = 50
"""Steps whose mean loss and accuracy make one line of a system's log."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, its data and its optimizer. One round of a system is one epoch.

    Attributes:
        name: how the command line calls it.
        title: what a table calls it.
        batch_size: examples of a step.
        steps: steps of a round: its data hold `steps * batch_size` examples.
        optimizer: the update rule; `LEARNING_RATE` and the rest are the same everywhere.
        scan: steps of one rolled `lax.scan` of the hand-written limit; `steps` is a multiple.
        unrolled: steps of one unrolled scan; `steps` is a multiple.
        rolls_on_cpu: whether the rolled scan is of use on the CPU, where XLA runs a convolution
            inside a loop on one thread, and 10 to 25 times slower.
    """

    name: str
    title: str
    batch_size: int
    steps: int
    optimizer: Literal["adam", "momentum", "adamw"]
    scan: int
    unrolled: int
    rolls_on_cpu: bool = True

    def scaled(self, factor: float) -> Workload:
        """Returns it with about `factor` times the steps in a round, still in whole scans."""
        unit = int(np.lcm(self.scan, self.unrolled))
        return dataclasses.replace(self, steps=max(1, round(self.steps * factor / unit)) * unit)


LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 1e-2

_ALL = (
    Workload(
        name="W1",
        title="MLP 64-128-10 on digits, batch 64, Adam",
        batch_size=64,
        steps=6400,
        optimizer="adam",
        scan=32,
        unrolled=8,
    ),
    Workload(
        name="W2",
        title="CNN 32-64-128-10 on 28x28x1, batch 128, Adam",
        batch_size=128,
        steps=16,
        optimizer="adam",
        scan=8,
        unrolled=4,
        rolls_on_cpu=False,
    ),
    Workload(
        name="W3",
        title="ResNet-8 on 32x32x3, batch 64, momentum",
        batch_size=64,
        steps=8,
        optimizer="momentum",
        scan=8,
        unrolled=4,
        rolls_on_cpu=False,
    ),
    Workload(
        name="W4",
        title="byte GPT, 4 layers of 128, context 128, batch 16, AdamW",
        batch_size=16,
        steps=8,
        optimizer="adamw",
        scan=8,
        unrolled=4,
    ),
)
WORKLOADS = {workload.name: workload for workload in _ALL}


def _section(name: str, title: str, batch_size: int, steps: int) -> Workload:
    return Workload(
        name=name,
        title=title,
        batch_size=batch_size,
        steps=steps,
        optimizer="adam",
        scan=1,
        unrolled=1,
    )


_OTHERS = (
    _section("input", "50,000 pictures of 32x32x3, batch 128", 128, 100),
    _section("loaders", "25,600 digits, batch 64", 64, 400),
    _section("evaluation", "MLP 64-128-10 over 30,000 digits, batch 64", 64, 469),
    _section("checkpoint", "10 M parameters and Adam's state, 126 MB", 1, 1),
)
ALL = {**WORKLOADS, **{workload.name: workload for workload in _OTHERS}}
"""Those that are trained, and those of single parts of a training."""


def make_arrays(workload: Workload) -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs and labels of an epoch: real digits for W1, random numbers for the others.

    Returns:
        Inputs `[examples, ...]`, float32, or int32 tokens; labels `[examples]`, or the next tokens
        `[examples, length]`, int32.
    """
    rng, examples = np.random.default_rng(0), workload.steps * workload.batch_size
    if workload.name == "W1":
        return digits(examples)
    if workload.name == "W4":
        tokens = rng.integers(0, 256, (examples, 129)).astype(np.int32)
        return tokens[:, :-1], tokens[:, 1:]
    shape = {"W2": (28, 28, 1), "W3": (32, 32, 3)}[workload.name]
    images = rng.standard_normal((examples, *shape), dtype=np.float32)
    return images, rng.integers(0, 10, examples).astype(np.int32)


def digits(examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the digits of scikit-learn over and over, float32 `[examples, 64]`, and labels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    rows = np.arange(examples) % len(bunch.target)
    return (bunch.data / 16).astype(np.float32)[rows], bunch.target.astype(np.int32)[rows]


def epoch_rows(workload: Workload, epoch: int) -> np.ndarray:
    """Returns the rows of each batch of an epoch, int32 `[steps, batch]`.

    It is the order of `distaff.data.ArrayLoader(..., shuffle=True, seed=0)`.
    """
    examples = workload.steps * workload.batch_size
    order = np.random.default_rng([0, epoch]).permutation(examples).astype(np.int32)
    return order.reshape(workload.steps, workload.batch_size)

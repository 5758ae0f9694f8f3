"""The suggestion for a loss that no longer improves."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest

from distaff import EarlyStopping, Monitor, OptimizerConfig
from distaff.optim import Plateau
from distaff.run.learning import Stagnation
from line import Line, loader

LOSS, ACCURACY = Monitor("val/loss"), Monitor("val/accuracy")


def lines(
    watch: Stagnation, name: str, values: list[float], training: list[float] | None = None
) -> dict[int, str]:
    """Returns the lines by epoch, from 1."""
    found = {}
    for epoch, value in enumerate(values, 1):
        metrics = {name: value}
        if training is not None:
            metrics["train/loss"] = training[epoch - 1]
        if line := watch(metrics, epoch):
            found[epoch] = line
    return found


def test_loss_that_does_not_improve_for_ten_epochs_is_one_line():
    values = [3.0, 2.0, *[2.5] * 30]
    ((epoch, text),) = lines(Stagnation(LOSS, 20), "val/loss", values, values).items()
    assert epoch == 12
    assert text.startswith("val/loss has not improved for 10 epochs (best: 2, epoch 2). Optimizer")
    assert "plateau=Plateau()" in text
    assert "EarlyStopping()" in text


def test_long_run_waits_for_a_tenth_of_it():
    found = lines(Stagnation(LOSS, 300), "val/loss", [1.0] * 60)
    assert list(found) == [31]


def test_training_loss_that_still_improves_is_overfitting():
    training = [1 / n for n in range(1, 21)]
    (text,) = lines(Stagnation(LOSS, 20), "val/loss", [1.0] * 20, training).values()
    assert "epoch 1), but train/loss has: the model may be overfitting" in text
    assert "Plateau" not in text


def test_training_loss_stands_in_for_a_metric_that_is_missing():
    (text,) = lines(Stagnation(LOSS, 20), "train/loss", [1.0, math.nan, *[1.0] * 12]).values()
    assert text.startswith("train/loss has not improved for 10 epochs")


@pytest.mark.parametrize(
    ("monitor", "values"),
    [
        (LOSS, [1 / n for n in range(1, 40)]),
        (LOSS, [1.0] * 10),
        (ACCURACY, [1.0] * 40),
        (LOSS, [0.0] * 40),
        (LOSS, [np.ones(3)] * 40),
        (ACCURACY, [n / 50 for n in range(40)]),
    ],
)
def test_no_line(monitor: Monitor, values: list[Any]):
    assert lines(Stagnation(monitor, 20), monitor.name, values) == {}


@pytest.mark.parametrize(
    ("options", "is_said"),
    [
        ({}, True),
        ({"callbacks": [EarlyStopping(patience=50)]}, False),
        ({"optimizer": OptimizerConfig("sgd", plateau=Plateau(patience=50))}, False),
    ],
)
def test_run_shows_the_line_unless_it_reacts_by_itself(options, is_said, caplog):
    trainer = Line(root=None, **options)  # its best model is that of the first epoch
    with caplog.at_level(logging.INFO, "distaff"):
        result = trainer.train_model(loader(), loader(), num_epochs=13)
    said = [each for each in caplog.messages if "has not improved" in each]
    assert len(said) == is_said
    assert result.epoch == 13
    assert all("val/loss has not improved for 10 epochs" in each for each in said)

"""How many files one enters to follow a step, a log window, an evaluation, a save.

A profile function notes the files of the package in which a function begins, on the main thread,
after the first epoch of a run, which compiles.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import distaff
from distaff import Callback, data
from line import BATCH, Line

PACKAGE = f"{Path(distaff.__file__).parent}/"
STEPS, WINDOW = 12, 4

MOST = {"step": 12, "window": 20, "evaluation": 14, "save": 20}
"""Most files that each may enter."""


class Ways:
    """What was entered, by what was done."""

    def __init__(self) -> None:
        self.files: dict[str, list[set[str]]] = {name: [] for name in MOST}
        self.entered: set[str] = set()
        self.num_logged = 0

    def note(self, frame: Any, event: str, argument: Any) -> None:
        """Notes the file of a function that begins."""
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            self.entered.add(frame.f_code.co_filename.removeprefix(PACKAGE))

    def start(self) -> None:
        """Begins to note, from nothing."""
        self.entered, self.num_logged = set(), 0
        sys.setprofile(self.note)

    def stop(self, name: str) -> None:
        """Ends to note; what was entered is filed under a name."""
        sys.setprofile(None)
        self.files[name].append(self.entered)

    @contextmanager
    def over(self, name: str) -> Iterator[None]:
        """Notes what is entered in a block."""
        self.start()
        try:
            yield
        finally:
            self.stop(name)

    def fewest(self, name: str) -> set[str]:
        """Returns what was entered where nothing came in between, as the first call of all does."""
        return min(self.files[name], key=len)


class Between(Callback):
    """Notes what is entered from one step to the next; with a window, if one was logged."""

    def __init__(self, ways: Ways) -> None:
        self.ways = ways

    def on_step_end(self, info):
        is_steady, place = info.step > STEPS, (info.step - 1) % STEPS + 1
        if is_steady and place > 1:
            self.ways.stop("window" if self.ways.num_logged else "step")
        if is_steady and place < STEPS:
            self.ways.start()


class Counting:
    """A logger that counts what it gets."""

    def __init__(self, ways: Ways) -> None:
        self.ways = ways

    def log_metrics(self, values, *, step, epoch):
        self.ways.num_logged += 1

    def log_config(self, config):
        """Needs none."""

    def close(self, status):
        """Has nothing to close."""


class Watched(Line):
    """Notes evaluations and saves after the first epoch."""

    ways: Ways

    def eval_model(self, loader, prefix=""):
        if self.epoch < 2:
            return super().eval_model(loader, prefix)
        with self.ways.over("evaluation"):
            return super().eval_model(loader, prefix)

    def save_model(self, metrics, is_best):
        if self.epoch < 2:
            return super().save_model(metrics, is_best)
        with self.ways.over("save"):
            return super().save_model(metrics, is_best)


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Ways:
    """What a run with a directory, a logger and a callback has entered."""
    ways, x = Ways(), np.ones((STEPS * BATCH, 3), np.float32)
    loader = data.ArrayLoader({"x": x, "y": x[:, 0]}, BATCH)
    options = {"steps_per_call": 1, "log_every_n_steps": WINDOW, "loggers": [Counting(ways)]}
    root = tmp_path_factory.mktemp("ways")
    trainer = Watched(callbacks=[Between(ways)], root=root, **options)
    trainer.ways = ways
    before = sys.getprofile()
    with pytest.MonkeyPatch.context() as patch:
        # The display is updated by the clock: here with the first step only.
        patch.setattr("distaff.run.recorder._PROGRESS_SECONDS", math.inf)
        try:
            result = trainer.train_model(loader, loader, num_epochs=5)
        finally:
            sys.setprofile(before)
    assert result.status == "finished"
    return ways


def test_ways_are_those_of_a_run(ways):
    counts = {name: len(noted) for name, noted in ways.files.items()}
    assert counts == {"step": 40, "window": 4, "evaluation": 4, "save": 4}
    assert ways.fewest("step") < ways.fewest("window")


@pytest.mark.parametrize("name", MOST)
def test_way_enters_few_files(name, ways):
    entered = ways.fewest(name)
    assert len(entered) <= MOST[name], sorted(entered)

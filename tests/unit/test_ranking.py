"""Which models a run remembers as its best, in which order, and what is kept of them on disk."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distaff import Callback, data
from distaff.checkpoint import CheckpointStore, find
from distaff.errors import ConfigError
from distaff.run.ranking import insert, retain
from distaff.run.result import Best
from scripted import Scripted


class Nearest(Scripted):
    """The score that is nearest to 5 is the best."""

    def is_new_model_better(self, new_metrics, old_metrics):
        def distance(metrics):
            return abs(metrics["val/score"] - 5)

        return old_metrics is None or distance(new_metrics) < distance(old_metrics)


class Interrupt(Callback):
    """Presses Ctrl-C within an epoch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, info):
        if info.step == self.step:
            signal.raise_signal(signal.SIGINT)


def loader() -> data.ArrayLoader:
    x = np.linspace(-1, 1, 48, dtype=np.float32).reshape(16, 3)
    return data.ArrayLoader({"x": x, "y": x.sum(1)}, batch_size=4)


def trained(*scores: float, cls: Any = Scripted, callbacks: Any = (), **options: Any) -> Any:
    """Returns a trainer that was trained for as many epochs as there are scores, and its result."""
    defaults = {"name": "run", "enable_progress_bar": False, "tune_process": False}
    trainer = cls(nn.Dense(1), callbacks=callbacks, **{**defaults, **options})
    trainer.scores = scores
    return trainer, trainer.train_model(loader(), loader(), num_epochs=len(scores))


def on_disk(path: Path) -> list[int]:
    return [int(folder.name[-8:]) for folder in sorted((path / "checkpoints").iterdir())]


def ranking(trainer: Any) -> list[int]:
    return [model.step for model in trainer.last_run.best_models]


def better(new: Any, old: Any) -> bool:
    return old is None or new["score"] < old["score"]


@given(scores=st.lists(st.integers(0, 5), max_size=12), number=st.integers(1, 4))
def test_ranking_is_the_sorted_list_where_the_older_of_equals_comes_first(scores, number):
    models: tuple[Best, ...] = ()
    for step, score in enumerate(scores):
        new = Best(step, step, {"score": score})
        is_best = better(new.metrics, models[0].metrics if models else None)
        models = retain(insert(models, new, better, is_best=is_best), number)
    expected = sorted(range(len(scores)), key=lambda step: (scores[step], step))
    assert [model.step for model in models] == expected[:number]


def test_model_that_is_judged_again_is_ranked_once():
    models = tuple(Best(step, step, {"score": step}) for step in (1, 2))
    again = insert(models, Best(2, 2, {"score": 0}), better, is_best=True)
    assert [model.step for model in again] == [2, 1]


def test_model_that_is_refused_as_the_first_is_not_ranked():
    assert insert((), Best(1, 1, {"score": 0}), better, is_best=False) == ()


def test_ranking_counts_only_models_that_have_a_checkpoint():
    models = tuple(Best(step, step, {}) for step in (50, 20, 40, 10, 30))
    # 50 is being written; 20 never was, as 40 is there.
    assert [model.step for model in retain(models, 1, {10, 30, 40})] == [50, 40]
    assert [model.step for model in retain(models, 2, {10, 30, 40})] == [50, 40, 10]


def test_keep_best_keeps_their_checkpoints_on_disk():
    trainer, result = trained(3.0, 1.0, 5.0, 2.0, 4.0, 6.0, keep_best=3, keep_last=1)
    assert ranking(trainer) == [8, 16, 4]
    assert on_disk(result.path) == [4, 8, 16, 24]
    assert (result.best, trainer.step) == (trainer.last_run.best_models[0], 8)
    store = CheckpointStore(result.path / "checkpoints")
    assert store.info(24)["best_steps"] == [8, 16, 4]
    assert find(result.path) == (store.directory, 8)
    status = json.loads((result.path / "status.json").read_text())
    assert (status["best"]["step"], status["status"]) == (8, "finished")


def test_keep_every_keeps_multiples_that_have_a_checkpoint():
    # 10 lies within an epoch of four steps.
    _, result = trained(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, keep_every=10, keep_last=2)
    assert on_disk(result.path) == [4, 20, 24]


def test_memory_keeps_several_best_models_of_the_last_training():
    trainer, result = trained(3.0, 1.0, 4.0, 2.0, keep_best=2, root=None, on_failed_save="warn")
    assert (ranking(trainer), result.best.step) == ([8, 16], 8)
    assert trainer.last_run.checkpointer.store.steps() == (8, 16)
    trainer.scores = (0.0, 0.0, 9.0, 8.0)  # it goes on from its second epoch
    trainer.train_model(loader(), loader(), num_epochs=2)
    assert [model.metrics["val/score"] for model in trainer.last_run.best_models] == [8.0, 9.0]


def test_is_new_model_better_orders_all_that_are_kept():
    trainer, result = trained(5.5, 9.0, 1.0, 4.0, 8.0, cls=Nearest, keep_best=3, keep_last=1)
    assert ranking(trainer) == [4, 16, 20]
    assert on_disk(result.path) == [4, 16, 20]


SCORES = (2.0, 1.0, 5.0, 3.0, 4.0, 1.5, 6.0)


@pytest.mark.slow
def test_best_models_are_kept_across_an_interruption():
    whole, at_once = trained(*SCORES, root="whole", keep_best=3, keep_last=1)
    options = {"root": "parts", "keep_best": 3, "keep_last": 1, "steps_per_call": 1}
    stopped, first = trained(*SCORES, callbacks=[Interrupt(18)], **options)
    assert (first.status, first.step) == ("interrupted", 18)
    assert ranking(stopped) == [8, 4, 16]
    resumed, second = trained(*SCORES, callbacks=[Interrupt(0)], **options)
    assert (second.path, second.step) == (first.path, at_once.step)
    assert resumed.last_run.best_models == whole.last_run.best_models
    assert ranking(resumed) == [8, 24, 4]
    assert on_disk(second.path) == on_disk(at_once.path) == [4, 8, 24, 28]


def test_resume_drops_a_model_whose_checkpoint_is_gone_and_takes_other_options():
    options = {"keep_last": 1, "steps_per_call": 1}
    first_options = {**options, "keep_best": 3, "on_failed_save": "warn"}
    _, first = trained(*SCORES, callbacks=[Interrupt(18)], **first_options)
    (first.path / "checkpoints" / "step_00000008").rename("elsewhere")
    options.update(keep_best=2, keep_every=20)
    resumed, second = trained(*SCORES, callbacks=[Interrupt(0)], **options)
    assert (second.path, ranking(resumed)) == (first.path, [24, 4])
    assert on_disk(second.path) == [4, 20, 24, 28]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep_best": 0}, "keep_best must be an integer, at least 1; got 0"),
        ({"keep_every": 0}, "or a number of steps; got 0."),
        ({"on_failed_save": "warm"}, "on_failed_save has no value 'warm'. Did you mean 'warn'"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ConfigError) as raised:
        trained(1.0, **options)
    assert words in str(raised.value)

"""A second `train_model`: it begins a new epoch, also after a run that ended within one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import pytest

from distaff import StopTraining, data
from distaff.callbacks import Callback
from line import STEPS_PER_EPOCH, Line, X
from scripted import InterruptError

ARRAYS = {"x": X, "y": X.sum(1).astype(np.float32), "row": np.arange(len(X), dtype=np.int32)}
BATCHES = [{name: array[i : i + 4] for name, array in ARRAYS.items()} for i in range(0, 16, 4)]
ROWS = [{name: array[i] for name, array in ARRAYS.items()} for i in range(16)]
LOADERS = {
    "arrays": lambda: data.ArrayLoader(ARRAYS, 4, shuffle=True),
    "stream": lambda: data.Stream(lambda: iter(BATCHES), length=4),
    "grain": lambda: data.as_loader(grain.MapDataset.source(ROWS).seed(0).shuffle().batch(4)),
    "mapped": lambda: data.MappedLoader(data.ArrayLoader(ARRAYS, 4, shuffle=True), dict),
}


class Witness(Callback):
    """Records the first row of each batch; raises after a step, if any."""

    def __init__(self, stop: dict[int, type[Exception]]) -> None:
        self.stop = stop

    def on_step_end(self, info: Any) -> None:
        jax.effects_barrier()
        if info.step in self.stop:
            raise self.stop.pop(info.step)("asked")


class Watched(Line):
    def __init__(self, stop: dict[int, type[Exception]] | None = None, **options: Any) -> None:
        self.seen: list[int] = []
        super().__init__(callbacks=[Witness(stop or {})], check_validation=False, **options)

    def loss_fn(self, params, batch, ctx):
        if ctx.train:
            jax.debug.callback(lambda row: self.seen.append(int(row[0])), batch["row"])
        return super().loss_fn(params, batch, ctx)

    def rows(self) -> list[int]:
        jax.effects_barrier()
        seen, self.seen = self.seen, []
        return seen


def orders(loader: Any, num_epochs: int) -> list[list[int]]:
    return [[int(batch["row"][0]) for batch in loader] for _ in range(num_epochs)]


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("second", [1, "6 steps"])
def test_a_training_after_a_budget_begins_an_epoch_whatever_happens_between(kind, second):
    whole = orders(LOADERS[kind](), 3)
    wanted = (whole[1] + whole[2])[: 4 if second == 1 else 6]
    trainer, loader = Watched(root=None), LOADERS[kind]()
    trainer.train_model(loader, num_epochs="3 steps")
    assert trainer.rows() == whole[0][:3]
    trainer.eval_model(loader)  # it restores the position of the loader, within the epoch
    result = trainer.train_model(loader, num_epochs=second)
    assert trainer.rows() == wanted
    assert result.step == 3 + len(wanted)
    assert trainer.last_run.plan.total_steps == len(wanted)
    trainer.train_model(loader, num_epochs=1)
    if second == 1:  # the second one ended with its epoch
        assert trainer.rows() == whole[2]


@pytest.mark.parametrize(("kind", "killed_at"), [("arrays", 4), ("arrays", 6), ("stream", 6)])
@pytest.mark.slow
def test_both_trainings_started_again_equal_those_of_one_process(kind, killed_at):
    def train(name: str, stop: dict[int, type[Exception]] | None = None) -> Line:
        options = {"check_validation": False, "save_every": "1 steps"}
        trainer = Line(name=name, callbacks=[Witness(stop or {})], **options)
        loader = LOADERS[kind]()
        trainer.train_model(loader, num_epochs="3 steps", key="first")
        trainer.train_model(loader, num_epochs=1, key="second")
        return trainer

    whole = train("whole")
    with pytest.raises(InterruptError):
        train("cut", {killed_at: InterruptError})
    again = train("cut")
    assert len(list(Path("runs/cut").glob("*"))) <= 3  # the first one was loaded
    assert again.step == whole.step == 3 + STEPS_PER_EPOCH
    jax.tree.map(np.testing.assert_array_equal, again.state.params, whole.state.params)


def test_a_training_after_one_that_a_callback_stopped_begins_an_epoch():
    whole = orders(LOADERS["arrays"](), 2)
    trainer, loader = Watched({2: StopTraining}, root=None), LOADERS["arrays"]()
    assert trainer.train_model(loader, num_epochs=1).status == "stopped"
    trainer.rows()
    trainer.train_model(loader, num_epochs=1)
    assert trainer.rows() == whole[1]


def test_steps_per_epoch_continues_with_the_batches_that_follow():
    whole = orders(LOADERS["arrays"](), 2)
    trainer, loader = Watched(root=None), LOADERS["arrays"]()
    trainer.train_model(loader, num_epochs="3 steps")
    trainer.rows()
    trainer.train_model(loader, num_epochs=1, steps_per_epoch=4)
    assert trainer.rows() == [*whole[0][3:], *whole[1][:3]]


def test_a_loader_that_was_moved_by_hand_stays_there():
    whole = orders(LOADERS["arrays"](), 2)
    trainer, loader = Watched(root=None), LOADERS["arrays"]()
    trainer.train_model(loader, num_epochs="3 steps")
    trainer.rows()
    loader.set_state({**loader.get_state(), "batch": 1})
    trainer.train_model(loader, num_epochs=1)
    assert trainer.rows() == whole[0][1:]

"""Which checkpoint is taken where some are damaged, and what is said of those passed over."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from distaff import data, tasks, zoo
from distaff.checkpoint import CheckpointStore, find
from distaff.errors import CheckpointError

INPUTS = np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3)


def make(directory: Path, *steps: int, best: dict[int, list[int]]) -> CheckpointStore:
    """Returns a store with a checkpoint of each step, which names its best ones."""
    x = jax.random.normal(jax.random.key(0), (2**12,))  # larger than all that describes it
    with CheckpointStore(directory, keep_last=len(steps)) as store:
        for step in steps:
            store.save(step, {"x": x}, {"best_steps": best.get(step)})
            store.wait()
    return CheckpointStore(directory)


def truncate(folder: Path, name: str = "") -> None:
    """Shortens a file of a checkpoint: its largest one, or that of a name."""
    files = [path for path in folder.rglob("*") if path.is_file() and name in path.name]
    file = max(files, key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)


INFO = "_CHECKPOINT_METADATA"


@pytest.mark.parametrize(
    ("harmed", "named", "found"),
    [
        ({}, 20, 20),
        ({40: ""}, 20, 20),  # nobody wants its arrays
        ({40: INFO}, 10, 10),  # what is best, the one before it says
        ({20: ""}, 20, 10),
        ({20: "", 10: ""}, 20, 40),
        ({20: "", 10: INFO, 40: ""}, 20, 30),
        ({20: "", 10: "", 30: INFO, 40: INFO}, None, None),
    ],
)
def test_find_takes_the_best_that_can_be_read_else_the_newest(
    tmp_path, caplog, harmed, named, found
):
    store = make(tmp_path, 10, 20, 30, 40, best={20: [20], 30: [10], 40: [20, 10]})
    for step, name in harmed.items():
        truncate(tmp_path / f"step_000000{step}", name)
    before = sorted(tmp_path.iterdir())
    with caplog.at_level(logging.WARNING, "distaff"):
        if found is None:
            with pytest.raises(CheckpointError, match=r"No checkpoint in .*step_00000020 cannot"):
                find(tmp_path)
            return
        assert (store.best(), find(tmp_path)) == (named, (tmp_path, found))
    passed_over = {step for step in harmed if f"step_000000{step} cannot be read" in caplog.text}
    wanted = {40} if harmed.get(40) == INFO else set()
    order = [20, 10, 40, 30]
    assert passed_over == wanted | ({*harmed} & {*order[: order.index(found)]})
    assert sorted(tmp_path.iterdir()) == before


def test_best_and_find_fail_only_where_no_checkpoint_can_be_read(tmp_path):
    store = make(tmp_path, 10, 20, best={20: [10]})
    for step in (10, 20):
        truncate(tmp_path / f"step_000000{step}", INFO)
    for read in (store.best, lambda: find(tmp_path)):
        with pytest.raises(CheckpointError, match="step_00000020 cannot be read"):
            read()


def test_folder_that_is_named_is_taken_whatever_its_state(tmp_path):
    make(tmp_path, 10, 20, best={})
    folder = tmp_path / "step_00000020"
    truncate(folder)
    assert find(folder) == (tmp_path, 20)
    with pytest.raises(CheckpointError, match="step_00000020 cannot be read"):
        CheckpointStore(tmp_path).load(20, {"x": np.zeros(2**12, np.float32)})


class Newest(tasks.Classifier):
    """Each model is better than the one before it."""

    def is_new_model_better(self, new_metrics, old_metrics):
        return True


def test_model_loads_though_the_newest_checkpoint_is_truncated(caplog, tmp_path):
    loader = data.ArrayLoader({"x": INPUTS, "label": np.arange(8) % 2}, 4)
    options = {"enable_progress_bar": False, "tune_process": False}
    trainer = Newest(zoo.MLP((4, 2)), root=str(tmp_path), **options)
    path = trainer.train_model(loader, loader, num_epochs=2).path
    folders = [path / "checkpoints" / f"step_0000000{step}" for step in (2, 4)]
    truncate(folders[1])
    loaded = Newest.load_from_checkpoint(path)
    expected = Newest.load_from_checkpoint(folders[0])
    np.testing.assert_array_equal(loaded.predict([INPUTS]), expected.predict([INPUTS]))
    assert f"{folders[1]} cannot be read" in caplog.text
    assert "Loading step 2 instead" in caplog.text
    with pytest.raises(CheckpointError, match="step_00000004 cannot be read"):
        Newest.load_from_checkpoint(folders[1])

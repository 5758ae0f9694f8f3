"""Checkpoints below any path and under any name, read by what they hold themselves."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from distaff import data, tasks, zoo
from distaff.checkpoint import CheckpointStore, arrays, find, folders, located, safe_path
from distaff.errors import CheckpointError

TREE = {"step": np.int32(3), "params": {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3)}}
ODD = {
    "brackets": "lr[0.1]",
    "patterns": "a*b?{c,d}",
    "percent": "100%25 #1",
    "unicode": "é 漢字",
    "newline": "two\nlines",
    "not utf-8": os.fsdecode(b"\xff\xfe"),
    "long": "x" * 250,
    "spaces": " a ",
}


def saved(directory, step=3):
    store = CheckpointStore(directory)
    store.save(step, TREE, {"epoch": 1})
    store.close()
    return store


def assert_loads(store, step=3):
    wanted = jax.tree.map(np.zeros_like, TREE)
    loaded = store.load(step, {"params": wanted["params"]})
    np.testing.assert_array_equal(loaded["params"]["w"], TREE["params"]["w"])


@pytest.mark.slow_but("unicode", "percent", "long")
@pytest.mark.parametrize("kind", ODD)
def test_checkpoint_below_an_odd_name_is_saved_and_read(kind, tmp_path):
    directory = tmp_path / ODD[kind] / "checkpoints"
    saved(directory)
    assert CheckpointStore(directory).check(3) is None
    assert_loads(CheckpointStore(directory))
    assert find(directory.parent) == (directory, 3)
    assert os.listdir(tmp_path) == [ODD[kind]]


def test_checkpoint_is_read_where_the_system_has_no_folder_of_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_path, "_OPEN_FILES", "/nowhere")
    saved(tmp_path / "a[b]")
    assert_loads(CheckpointStore(tmp_path / "a[b]"))


@pytest.mark.parametrize("name", ["final_model", "best [1]", "step_3", "step_00000099"])
def test_checkpoint_that_was_renamed_or_linked_is_one(name, tmp_path):
    saved(tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints" / folders.name_of(3)
    shutil.copytree(folder, tmp_path / name)
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / name
    link.symlink_to(folder)
    found = located(link)
    assert (found.step, found.folder) == (3, folder)
    assert_loads(found.store)
    copied = located(tmp_path / name)
    assert copied.folder == tmp_path / name
    assert_loads(copied.store, copied.step)
    assert copied.step == (99 if name == "step_00000099" else 3)
    os.remove(tmp_path / name / "commit_success.txt")
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        located(tmp_path / name)


def test_checkpoint_in_a_circle_of_links_is_none(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        located(tmp_path / "a")


@pytest.mark.parametrize("read", ["metadata", "read"])
def test_first_checkpoint_of_a_run_that_cannot_be_read_back_is_not_kept(
    read, tmp_path, monkeypatch
):
    wrong = {"metadata": {}, "read": {"step": np.int32(4)}}[read]
    store = CheckpointStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(arrays, read, lambda *_: wrong)
        store.save(3, TREE, {})
        with pytest.raises(CheckpointError, match="not written"):
            store.close()
    assert store.steps() == ()
    store.save(3, TREE, {})
    store.wait()
    monkeypatch.setattr(arrays, read, lambda *_: 1 / 0)  # the others are not read back
    store.save(6, TREE, {})
    store.close()
    assert store.steps() == (3, 6)


def test_save_looks_at_no_checkpoint_but_its_own(tmp_path, monkeypatch):
    for step in range(1, 301):
        (tmp_path / folders.name_of(step)).mkdir()
        (tmp_path / folders.name_of(step) / "commit_success.txt").touch()
    store = CheckpointStore(tmp_path, keep_every=1)
    store.save(301, TREE, {})
    store.wait()
    looks = []
    step_of, listed = folders.step_of, os.scandir
    monkeypatch.setattr(folders, "step_of", lambda path: looks.append(path.name) or step_of(path))
    monkeypatch.setattr(os, "scandir", lambda path: looks.append(str(path)) or listed(path))
    store.save(302, TREE, {})
    store.wait()
    monkeypatch.undo()
    assert not {str(tmp_path), *map(folders.name_of, range(1, 302))}.intersection(looks)
    assert folders.name_of(302) in looks
    assert store.steps() == tuple(range(1, 303))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that ended by an error, after two epochs."""
    root = tmp_path_factory.mktemp("runs")
    trainer = make(root)
    trainer.on_validation_epoch_end = lambda epoch, *_: 1 / (3 - epoch)
    with pytest.raises(ZeroDivisionError):
        train(trainer)
    return trainer.last_run.path


def make(root, **options):
    return tasks.Classifier(zoo.MLP((2, 10)), root=root, enable_progress_bar=False, **options)


def train(trainer):
    train, val, _ = data.digits(batch_size=512)
    return trainer.train_model(train, val, num_epochs=4, steps_per_epoch=1)


DAMAGES = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_text(""),
    "half": lambda file: file.write_bytes(file.read_bytes()[:40]),
    "another": lambda file: file.write_text("[]"),
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.slow
def test_checkpoint_is_loaded_without_the_record_of_its_run(kind, run, tmp_path, caplog):
    copied = Path(shutil.copytree(run, tmp_path / "0001"))
    DAMAGES[kind](copied / "config.json")
    loaded = tasks.Classifier.load_from_checkpoint(copied)
    assert loaded.step == 2
    assert "The record in the checkpoint" in caplog.text
    shutil.copytree(copied / "checkpoints" / folders.name_of(2), tmp_path / "mine")
    assert tasks.Classifier.load_from_checkpoint(tmp_path / "mine").step == 2


@pytest.mark.slow_but("half-config.json", "another-status.json")
@pytest.mark.parametrize("name", ["config.json", "status.json", "env.json"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_run_whose_files_are_damaged_is_resumed(name, kind, run, tmp_path, caplog):
    copied = Path(shutil.copytree(run, tmp_path / "classifier" / "0001"))
    DAMAGES[kind](copied / name)
    trainer = make(tmp_path, resume="must")
    result = train(trainer)
    assert (result.path, result.step, result.epoch) == (copied, 4, 4)
    if name != "env.json":
        assert name in caplog.text
    for each in ("config.json", "status.json", "env.json"):
        assert isinstance(json.loads((copied / each).read_text()), dict)


def test_start_with_other_versions_says_so_and_the_record_keeps_all_starts(run, tmp_path, caplog):
    copied = Path(shutil.copytree(run, tmp_path / "classifier" / "0001"))
    written = json.loads((copied / "env.json").read_text())
    assert len(written["starts"]) == 1
    written["starts"][0]["packages"]["jax"] = "0.1.0"
    written["starts"][0]["python"] = "3.0.0"
    (copied / "env.json").write_text(json.dumps(written))
    with caplog.at_level("INFO"):
        train(make(tmp_path, resume="must"))
    assert f"jax: 0.1.0 -> {jax.__version__}" in (copied / "log.txt").read_text()
    assert "python: 3.0.0 -> " in (copied / "log.txt").read_text()
    starts = json.loads((copied / "env.json").read_text())["starts"]
    assert [each["packages"]["jax"] for each in starts] == ["0.1.0", jax.__version__]
    assert all(each["time"] for each in starts)

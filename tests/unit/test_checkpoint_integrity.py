"""Whether a damaged checkpoint is found, named, passed over and never removed."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from distaff import tasks
from distaff.checkpoint import CheckpointStore, arrays, find, manifest
from distaff.errors import CheckpointError

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints"
INPUTS = np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3)
X = {"x": np.zeros(3, np.float32)}


def save(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(step, {"x": jnp.full(3, float(step))}, {"epoch": step})
        store.wait()


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def shorten(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize("version", [0, 1])
def test_checkpoints_of_every_format_load(version: int, tmp_path: Path) -> None:
    run = shutil.copytree(GOLDEN / f"format_{version}", tmp_path / "run")
    has_manifest = [path.name for path in run.rglob(manifest.NAME)] != []
    assert has_manifest == (version > 0)
    loaded = tasks.Classifier.load_from_checkpoint(run)
    expected = json.loads((run / "outputs.json").read_text())
    np.testing.assert_allclose(loaded.predict([INPUTS]), expected, rtol=1e-5)
    store = CheckpointStore(run / "checkpoints")
    assert store.newest_valid() == (2, [])
    assert store.info(2)["epoch"] == 1
    assert manifest.FORMAT_KEY not in store.info(2)


def test_first_checkpoint_is_read_back_unless_it_need_not_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("it holds something else")

    monkeypatch.setattr(arrays, "check_readable", fail)
    save(CheckpointStore(tmp_path / "beside", reads_back=False), 1)
    with pytest.raises(CheckpointError, match="it holds something else"):
        save(CheckpointStore(tmp_path / "alone"), 1)


@pytest.mark.parametrize("harm", [flip_a_bit, shorten, Path.unlink])
def test_harm_to_any_file_is_found(tmp_path: Path, harm: object) -> None:
    with CheckpointStore(tmp_path / "whole") as store:
        save(store, 1)
    names = [path.relative_to(store.directory) for path in files_of(store.directory)]
    assert len(names) > 8
    for name in names:
        shutil.rmtree(tmp_path / "harmed", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "harmed")
        file = tmp_path / "harmed" / name
        harmed = CheckpointStore(tmp_path / "harmed")
        if file.stat().st_size == 0 and harm is not Path.unlink:
            file.write_text("no longer empty")
        else:
            harm(file)
        if file.name == "commit_success.txt" and not file.exists():
            assert harmed.steps() == ()
            continue
        with pytest.raises(CheckpointError, match=r"step_00000001 cannot be read: ") as raised:
            harmed.load(1, X)
        assert file.name in str(raised.value) or file.name == manifest.NAME, name
        assert harmed.check(1) is not None
        step, skipped = harmed.newest_valid()
        assert (step, len(skipped)) == (None, 1)


def test_info_compares_its_file_with_the_manifest(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        save(store, 1)
    file = tmp_path / "step_00000001" / "_CHECKPOINT_METADATA"
    file.write_text(file.read_text().replace('"epoch": 1', '"epoch": 9'))
    with pytest.raises(
        CheckpointError, match="_CHECKPOINT_METADATA has changed since it was written"
    ):
        store.info(1)


def test_newest_valid_names_what_it_passed_over_and_leaves_it(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, keep_last=3) as store:
        save(store, 10, 20, 30)
    for step in (20, 30):
        flip_a_bit(
            max(files_of(store.directory / f"step_000000{step}"), key=lambda f: f.stat().st_size)
        )
    assert store.check(10) is None
    step, skipped = store.newest_valid()
    assert step == 10
    assert ["step_00000030" in skipped[0], "step_00000020" in skipped[1]] == [True, True]
    assert store.steps() == (10, 20, 30)


def test_run_goes_on_from_the_valid_one_and_removes_no_damaged_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with CheckpointStore(tmp_path, keep_last=4) as store:
        save(store, 10, 20, 30, 40)
    for name in ("step_00000030", "step_00000040"):
        shorten(tmp_path / name / "state" / "_METADATA")
    with CheckpointStore(tmp_path, keep_last=1) as store:
        assert store.newest_valid()[0] == 20
        save(store, 25)
        assert store.steps() == (25, 30, 40)
        with caplog.at_level(logging.WARNING, "distaff"):
            save(store, 40)
        assert store.check(40) is None
        assert store.load(40, X)["x"][0] == 40
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("step_00000030", "step_00000040", "step_00000040.damaged")
    ]
    assert "step_00000040.damaged" in caplog.text


def test_newest_step_is_saved_again_where_its_info_was_damaged(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        save(store, 1)
        shorten(tmp_path / "step_00000001" / manifest.INFO_FILE)
        save(store, 1)
        assert store.check(1) is None
    names = ["step_00000001", "step_00000001.damaged"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_newer_format_is_refused(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        save(store, 1)
    file = tmp_path / "step_00000001" / manifest.NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2}))
    for read in (lambda: store.load(1, X), lambda: store.info(1), lambda: find(tmp_path)):
        with pytest.raises(CheckpointError, match=r"its format is 2, .* reads up to 1"):
            read()


def test_lost_manifest_is_not_taken_for_an_old_checkpoint(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        save(store, 1)
    (tmp_path / "step_00000001" / manifest.NAME).unlink()
    with pytest.raises(CheckpointError, match=f"{manifest.NAME} is missing"):
        store.load(1, X)


@pytest.fixture
def no_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def test_nothing_is_writable_by_everybody(tmp_path: Path, no_umask: None) -> None:
    directory = tmp_path / "run" / "checkpoints"
    with CheckpointStore(directory) as store:
        save(store, 1)
    entries = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    assert len(entries) > 10
    assert [str(entry) for entry in entries if entry.stat().st_mode & 0o002] == []


def test_first_save_removes_what_killed_saves_left_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left = ["step_00000003.saving", "step_00000002.expired", "step_00000003.orbax-checkpoint-tmp"]
    kept = ["step_00000003.damaged", "step_3.saving", "my.saving"]
    for name in left + kept:
        (tmp_path / name / "state").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "step_00000009.saving").symlink_to(tmp_path / "outside")
    (tmp_path / "step_00000008.saving").write_text("a file")
    with CheckpointStore(tmp_path) as store:
        assert store.steps() == ()
        save(store, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*kept, "outside", "step_00000005", "step_00000008.saving", "step_00000009.saving"]
    )
    assert [record for record in caplog.records if record.name == "distaff"] == []


def test_save_whose_write_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(manifest.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("broken")))
        store.save(1, {"x": jnp.ones(1)}, {})
        store._writer.wait()
        with pytest.raises(CheckpointError, match="step_00000001 was not written: broken"):
            store.check_failure()
    store.check_failure()
    assert list(tmp_path.iterdir()) == []


def test_check_failure_waits_for_no_lock(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with store._writer._changed:
        store.check_failure()
    store.close()


def test_provisional_checkpoint_goes_with_the_next_one_and_counts_as_none(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, keep_last=2) as store:
        for step in (1, 2, 3, 4):
            store.save(step, {"x": np.ones(3)}, {"provisional": step >= 3})
            store.wait()
    assert store.steps() == (1, 2, 4)
    with CheckpointStore(tmp_path, keep_last=2) as again:
        assert again.newest_valid() == (4, [])
        again.save(5, {"x": np.ones(3)}, {})
        again.wait()
    assert again.steps() == (2, 5)


def test_newest_step_is_replaced_where_there_is_more_to_tell(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"x": np.ones(3)}, {"provisional": True})
        store.wait()
        store.save(1, {"x": np.ones(3)}, {"best_step": 1})
    assert (store.steps(), store.info(1)) == ((1,), {"best_step": 1})
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000001"]
    (tmp_path / "step_00000001").rename(tmp_path / "step_00000001.replaced")
    assert CheckpointStore(tmp_path).newest_valid() == (1, [])

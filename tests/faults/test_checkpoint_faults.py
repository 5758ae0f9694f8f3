"""What is left of a run when a save fails, or the process dies in the middle of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.checkpoint import CheckpointStore
from distaff.errors import CheckpointError

SAVE_AND_START_ANOTHER = """
import pathlib, sys, jax.numpy as jnp
from distaff.checkpoint import CheckpointStore

store = CheckpointStore(sys.argv[1])
store.save(1, {"x": jnp.full(4, 1.0)}, {"best_step": 1})
store.wait()
store.save(2, {"x": jnp.arange(2.0**25)}, {"best_step": 2})
while not list(pathlib.Path(sys.argv[1]).glob("step_00000002.*")):
    pass  # the folder is made in the background
print("saving", flush=True)
sys.stdin.read()
"""

SAVE_AND_DIE = """
import os, signal, shutil, sys
import jax.numpy as jnp
from distaff.checkpoint import CheckpointStore, arrays, folders, manifest, store

moment = sys.argv[2]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def die_after_one_file(folder, **_):
    next(path for path in folder.rglob("*") if path.is_file()).unlink()
    die()

with CheckpointStore(sys.argv[1], keep_last=1) as checkpoints:
    checkpoints.save(1, {"x": jnp.full(3, 1.0)}, {})
    checkpoints.wait()
    if moment == "before Orbax writes":
        arrays.write = die
    elif moment == "before the manifest":
        manifest.seal = die
    elif moment == "within the manifest":
        manifest.json.dumps = die
    elif moment == "before the rename":
        folders.put_in_place = die
    elif moment == "after the rename":
        manifest.sync_directory = lambda folder: die() if str(folder) == sys.argv[1] else None
    elif moment == "before the removal":
        CheckpointStore._remove_expired = die
    elif moment == "within the removal":
        folders.shutil.rmtree = lambda folder, **options: (
            die_after_one_file(folder) if folder.suffix == ".expired" else None
        )
    checkpoints.save(2, {"x": jnp.full(3, 2.0)}, {})
"""
MOMENTS = {
    "before Orbax writes": (1,),
    "before the manifest": (1,),
    "within the manifest": (1,),
    "before the rename": (1,),
    "after the rename": (1, 2),
    "before the removal": (1, 2),
    "within the removal": (2,),
}

SAVE_ON_SIXTEEN_DEVICES = """
import sys, jax, jax.numpy as jnp
from distaff.checkpoint import CheckpointStore

mesh = jax.make_mesh((16,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
state = {"x": jax.device_put(jnp.arange(2.0**20), rows), "tuple": (jnp.int32(3),)}
with CheckpointStore(sys.argv[1]) as store:
    store.save(1, state, {"epoch": 1})
"""


def start(
    script: str, directory: Path, *arguments: str, **environment: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, str(directory), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    )


def save(store: CheckpointStore, step: int) -> None:
    store.save(step, {"x": jnp.full(3, float(step))}, {"best_step": step})
    store.wait()


@pytest.mark.slow
def test_kill_during_a_save_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    with start(SAVE_AND_START_ANOTHER, tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "saving\n"
        process.kill()
    assert any(path.name.startswith("step_00000002.") for path in tmp_path.iterdir())
    with CheckpointStore(tmp_path, keep_last=1) as store:
        assert (store.steps(), store.best()) == ((1,), 1)
        loaded = store.load(1, {"x": np.zeros(4, np.float32)})
        np.testing.assert_array_equal(loaded["x"], np.ones(4))
        save(store, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.slow
def test_kill_at_any_moment_leaves_only_whole_checkpoints(tmp_path: Path, moment: str) -> None:
    with start(SAVE_AND_DIE, tmp_path, moment) as process:
        errors = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, errors
    store = CheckpointStore(tmp_path, keep_last=2)
    assert store.steps() == MOMENTS[moment]
    assert store.newest_valid() == (max(MOMENTS[moment]), [])
    for step in store.steps():
        loaded = store.load(step, {"x": np.zeros(3, np.float32)})
        np.testing.assert_array_equal(loaded["x"], np.full(3, step))
    save(store, 3)
    names = [f"step_0000000{step}" for step in store.steps()]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert store.latest() == 3


def test_temporary_files_may_be_on_another_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "does not exist"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "does not exist"))
    store = CheckpointStore(tmp_path / "checkpoints")
    save(store, 1)
    assert store.check(1) is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Returns a directory on a file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can only be mounted by root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_is_named_and_leaves_the_previous_checkpoint(small_disk: Path) -> None:
    store = CheckpointStore(small_disk)
    save(store, 1)
    store.save(2, {"x": jax.random.normal(jax.random.key(0), (2**20,))}, {"best_step": 2})
    store._writer.wait()
    with pytest.raises(
        CheckpointError, match=r"step_00000002 was not written.*The disk is full: free some space"
    ):
        store.check_failure()
    assert [path.name for path in small_disk.iterdir()] == ["step_00000001"]
    assert store.newest_valid() == (1, [])
    save(store, 3)
    assert store.newest_valid() == (3, [])


def test_read_only_disk_is_named(small_disk: Path) -> None:
    store = CheckpointStore(small_disk)
    save(store, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(
        CheckpointError, match=r"step_00000002 was not written.*The file system is read-only"
    ):
        save(store, 2)
    assert store.check(1) is None
    loaded = CheckpointStore(small_disk).load(1, {"x": np.zeros(3, np.float32)})
    np.testing.assert_array_equal(loaded["x"], np.ones(3))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes whatever the permissions are")
def test_directory_without_permission_is_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(CheckpointError, match=r"step_00000002 .* change its permissions"):
            save(store, 2)
    finally:
        tmp_path.chmod(0o755)
    assert store.check(1) is None


def test_checkpoint_of_sixteen_devices_loads_on_one(tmp_path: Path) -> None:
    flags = "--xla_force_host_platform_device_count=16"
    with start(SAVE_ON_SIXTEEN_DEVICES, tmp_path, XLA_FLAGS=flags) as process:
        errors = process.communicate()[1]
    assert process.returncode == 0, errors
    abstract = {"x": jax.ShapeDtypeStruct((2**20,), jnp.float32), "tuple": (jnp.int32(0),)}
    loaded = CheckpointStore(tmp_path).load(1, abstract)
    np.testing.assert_array_equal(loaded["x"], np.arange(2.0**20))
    assert loaded["x"].devices() == {jax.local_devices()[0]}
    assert int(loaded["tuple"][0]) == 3


def test_save_does_not_replace_what_is_in_the_way(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    save(store, 1)
    (tmp_path / "step_00000002").write_text("in the way")
    with pytest.raises(
        CheckpointError, match=r"step_00000002 was not written.*move that away, and save again"
    ):
        save(store, 2)
    save(store, 3)
    assert store.steps() == (1, 3)


def test_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match=r"checkpoints/step_00000001 was not written: .*"):
        save(CheckpointStore(tmp_path / "checkpoints"), 1)


@pytest.mark.parametrize("how", ["save", "wait", "close", "check_failure"])
def test_error_of_the_background_write_surfaces_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    store = CheckpointStore(tmp_path)
    save(store, 1)
    with monkeypatch.context() as patched:
        patched.setattr("distaff.checkpoint.arrays.write", full_disk)
        store.save(2, {"x": jnp.ones(1)}, {})
        store._writer.wait()
    with pytest.raises(CheckpointError, match=r"step_00000002 was not written: No space left"):
        store.save(3, {"x": jnp.ones(1)}, {}) if how == "save" else getattr(store, how)()
    store.close()
    assert store.steps() == (1,)


def test_truncated_file_is_reported_with_the_path(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"x": jnp.arange(2.0**16)}, {})
    data = max((tmp_path / "step_00000001").rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(data, data.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"step_00000001 cannot be read"):
        store.load(1, {"x": np.zeros(2**16, np.float32)})

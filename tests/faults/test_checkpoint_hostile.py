"""A folder from somebody else: loading it may fail, with a CheckpointError, and does nothing more.

The folders have no manifest, or one that fits them: a checksum is no proof of good will.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from distaff.checkpoint import CheckpointStore, find, manifest
from distaff.errors import CheckpointError

# Where one array cannot be opened, Orbax does not wait for the others.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.timeout(60),
]

X = {"x": np.zeros(3, np.float32)}
INFO = manifest.INFO_FILE


@pytest.fixture(scope="module", autouse=True)
def leftovers() -> Iterator[None]:
    """Collects what Orbax has left behind here, and not in a test that comes later."""
    yield
    gc.collect()


class Bomb:
    """What a pickle makes when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("honest")
    with CheckpointStore(directory) as store:
        store.save(1, {"x": jnp.arange(3.0), "key": jax.random.key(0)}, {"epoch": 1})
    return directory


def describe(folder: Path) -> None:
    """Writes a manifest that fits what is in a folder."""
    (folder / manifest.NAME).unlink(missing_ok=True)
    files = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "crc32": zlib.crc32(path.read_bytes()),
        }
        for path in folder.rglob("*")
        if path.is_file() and path.stat().st_size < 2**20
    }
    (folder / manifest.NAME).write_text(json.dumps({"format": 1, "files": files}))


def forget(folder: Path) -> None:
    """Makes a folder one of format 0."""
    (folder / manifest.NAME).unlink()
    (folder / INFO).write_text((folder / INFO).read_text().replace(manifest.FORMAT_KEY, "plain"))


def content(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    found = {}
    for path in [directory, *directory.rglob("*")]:
        status = path.lstat()
        is_small = path.is_file() and not path.is_symlink() and status.st_size < 2**20
        data = path.read_bytes() if is_small else b""
        found[str(path)] = (status.st_mode, status.st_mtime_ns, data)
    return found


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


def written(name: str, text: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)

    return change


def sparse(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, 2**40)


def linked(name: str) -> Callable[[Path], None]:
    """Moves a file or folder out of the checkpoint, and leaves a link to it there."""

    def change(folder: Path) -> None:
        outside = folder.parents[1] / "outside"
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)

    return change


def fifo(folder: Path) -> None:
    (folder / "state" / "_METADATA").unlink()
    os.mkfifo(folder / "state" / "_METADATA")


def zarr(**fields: Any) -> Callable[[Path], None]:
    """Changes what the database of the arrays declares of `x`."""

    def change(folder: Path) -> None:
        base = {"driver": "file", "path": f"{folder}/state/"}
        database = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
        declared = {**json.loads(database["x/zarr.json"]), **fields}
        database["x/zarr.json"] = json.dumps(declared)

    return change


def grid(*shape: int) -> dict[str, Any]:
    return {"name": "regular", "configuration": {"chunk_shape": list(shape)}}


def huge_pieces(folder: Path, **fields: Any) -> None:
    database = tensorstore.KvStore.open(
        {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/state/"}}
    ).result()
    (codec,) = json.loads(database["x/zarr.json"])["codecs"]
    codec["configuration"]["chunk_shape"] = [2**40]
    zarr(chunk_grid=grid(2**40), codecs=[codec], **fields)(folder)


METADATA = "state/_METADATA"
DEEP = "[" * 200_000 + "]" * 200_000
PICKLED = pickle.dumps(Bomb())
CHANGES = {
    "info is a pickle": written(INFO, PICKLED),
    "info is deep": written(INFO, '{"custom_metadata": ' + DEEP + "}"),
    "info is huge": sparse(INFO),
    "info is a list": written(INFO, "[]"),
    "info holds a list": written(INFO, '{"custom_metadata": [1], "item_handlers": {}}'),
    "metadata is a pickle": written(METADATA, PICKLED),
    "metadata is deep": written(METADATA, '{"tree_metadata": ' + DEEP + "}"),
    "metadata is huge": sparse(METADATA),
    "metadata is a list": written(METADATA, "[]"),
    "metadata is a number": written(METADATA, "1"),
    "metadata has no tree": written(METADATA, "{}"),
    "key leads out": replaced(METADATA, '"x"', '"../../../../x"'),
    "key is a number": replaced(METADATA, '"key": "x"', '"key": 3'),
    "key type is unknown": replaced(METADATA, '"key_type": 2', '"key_type": 99'),
    "value type is a class": replaced(METADATA, "np.ndarray", "subprocess.Popen"),
    "value type is a number": replaced(METADATA, '"value_type": "np.ndarray"', '"value_type": 5'),
    "database is a pickle": written("state/manifest.ocdbt", PICKLED),
    "database is empty": written("state/manifest.ocdbt", b""),
    "file is linked": linked(METADATA),
    "folder is linked": linked("state/d"),
    "state is linked": linked("state"),
    "file is a fifo": fifo,
    "shape is huge": zarr(shape=[2**50], chunk_grid=grid(2**50)),
    "shape is huge in small pieces": zarr(shape=[2**50]),
    "shards are huge": zarr(chunk_grid=grid(2**40)),
    "shards of many pieces are huge": zarr(chunk_grid=grid(3 * 2**40)),
    "pieces are huge": huge_pieces,
    "shape is negative": zarr(shape=[-3]),
    "shape is a text": zarr(shape="many"),
    "type is unknown": zarr(data_type="object"),
    "codec is unknown": zarr(codecs=[{"name": "pickle"}]),
}


@pytest.mark.parametrize("with_manifest", [True, False], ids=["manifest", "format_0"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_hostile_folder_only_fails_to_load(
    tmp_path: Path, honest: Path, change: Callable[[Path], None], with_manifest: bool
) -> None:
    directory = shutil.copytree(honest, tmp_path / "run" / "checkpoints")
    folder = directory / "step_00000001"
    if not with_manifest:
        forget(folder)
    change(folder)
    if with_manifest:
        describe(folder)
    before = content(tmp_path)
    store = CheckpointStore(directory)
    with pytest.raises(CheckpointError, match="step_00000001"):
        store.load(1, X)
    with contextlib.suppress(CheckpointError):
        store.info(1)
    store.newest_valid()
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        DEEP,
        '{"format": "1", "files": {}}',
        '{"format": true, "files": {}}',
        '{"format": -1, "files": {}}',
        '{"format": 1, "files": []}',
        '{"format": 1, "files": {}}',
        '{"format": ' + "9" * 5000 + ', "files": {}}',
        *(
            json.dumps({"format": 1, "files": {INFO: {"size": 1, "crc32": 1}, **files}})
            for files in (
                {INFO: 5},
                {INFO: {"size": "1", "crc32": []}},
                {"../../secret": {"size": 6, "crc32": 1}},
                {"/etc/passwd": {"size": 6, "crc32": 1}},
                {"state\0": {"size": 6, "crc32": 1}},
                {"\ud800": {"size": 6, "crc32": 1}},
                {"x" * 5000: {"size": 6, "crc32": 1}},
                {"state": {"size": 4096, "crc32": 1}},
            )
        ),
        PICKLED.decode("latin-1"),
    ],
)
def test_hostile_manifest_only_fails_to_load(tmp_path: Path, honest: Path, text: str) -> None:
    directory = shutil.copytree(honest, tmp_path / "run" / "checkpoints")
    (directory / "step_00000001" / manifest.NAME).write_bytes(text.encode(errors="replace"))
    (tmp_path / "run" / "secret").write_text("secret")
    before = content(tmp_path)
    store = CheckpointStore(directory)
    for read in (lambda: store.info(1), lambda: store.load(1, X), lambda: find(directory)):
        with pytest.raises(CheckpointError, match="step_00000001 cannot be read"):
            read()
    assert store.check(1) is not None
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname", "./state", "state//x", ""])
def test_manifest_opens_no_file_elsewhere(
    tmp_path: Path, honest: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = shutil.copytree(honest, tmp_path / "run" / "checkpoints")
    file = directory / "step_00000001" / manifest.NAME
    described = json.loads(file.read_text())
    described["files"][name] = {"size": 6, "crc32": 1}
    file.write_text(json.dumps(described))
    assert "cannot be a file of a checkpoint" in str(CheckpointStore(directory).check(1))


def test_pieces_larger_than_their_array_are_named(tmp_path: Path, honest: Path) -> None:
    directory = shutil.copytree(honest, tmp_path / "run")
    huge_pieces(directory / "step_00000001")
    describe(directory / "step_00000001")
    with pytest.raises(CheckpointError, match=r"'x' of shape \[3\] is stored in chunks of \[1099"):
        CheckpointStore(directory).load(1, X)


@pytest.mark.parametrize("kind", ["np.ndarray", "jax.Array", "scalar", "int", "string", "None"])
def test_huge_array_is_not_allocated_whatever_it_is_said_to_be(
    tmp_path: Path, honest: Path, kind: str
) -> None:
    directory = shutil.copytree(honest, tmp_path / "run")
    folder = directory / "step_00000001"
    huge_pieces(folder, shape=[2**40])
    replaced(METADATA, "np.ndarray", kind)(folder)
    describe(folder)
    for leaf in (np.zeros(3, np.float32), jnp.float32(0)):
        with pytest.raises(CheckpointError, match="step_00000001"):
            CheckpointStore(directory).load(1, {"x": leaf})


@pytest.mark.parametrize("name", [METADATA, INFO, "state/_sharding", "any"])
def test_huge_json_is_refused_by_its_size(tmp_path: Path, honest: Path, name: str) -> None:
    directory = shutil.copytree(honest, tmp_path / "run")
    with (directory / "step_00000001" / name).open("ab") as file:
        file.truncate(2**25 + 1)
    with pytest.raises(CheckpointError, match=f"{name} has 33554433 bytes; the limit is 33554432"):
        CheckpointStore(directory).load(1, X)


def test_handler_of_another_name_is_not_called(tmp_path: Path, honest: Path) -> None:
    directory = shutil.copytree(honest, tmp_path / "run")
    folder = directory / "step_00000001"
    handler = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
    replaced(INFO, handler, "os.getcwd")(folder)
    describe(folder)
    before = content(tmp_path)
    np.testing.assert_array_equal(CheckpointStore(directory).load(1, X)["x"], np.arange(3.0))
    assert content(tmp_path) == before


def test_folder_that_is_a_link_is_no_checkpoint(tmp_path: Path, honest: Path) -> None:
    (tmp_path / "step_00000001").symlink_to(honest / "step_00000001")
    assert CheckpointStore(tmp_path).steps() == ()
    with pytest.raises(CheckpointError, match="There is no whole checkpoint"):
        find(tmp_path)


def test_info_of_wrong_types_is_taken_for_no_best(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        store.save(1, X, {"best_steps": {"a": 1}, "best_step": [1]})
    assert (store.best(), find(tmp_path)) == (None, (tmp_path, 1))


def test_honest_copies_load(tmp_path: Path, honest: Path) -> None:
    for name, change in (("described", describe), ("forgotten", forget)):
        directory = shutil.copytree(honest, tmp_path / name)
        change(directory / "step_00000001")
        loaded = CheckpointStore(directory).load(1, X)
        np.testing.assert_array_equal(loaded["x"], np.arange(3.0))

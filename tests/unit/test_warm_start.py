"""Weights that a model begins with: from runs, files and trees, by name, or an error."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.flax import save_file as save_flax
from safetensors.numpy import load_file, save_file

import distaff
from distaff import InitFrom, OptimizerConfig, export_weights
from distaff.checkpoint.weights import loaded, named
from distaff.errors import CheckpointError, ConfigError, DistaffError, MissingExtraError
from distaff.models import Variables
from distaff.optim import ParamGroup


class Net(nn.Module):
    width: int = 4
    encoder: str = "encoder"

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(self.width, name=self.encoder)(x))
        return nn.Dense(1, name="head")(nn.relu(x))


class Regression(distaff.TrainerModule):
    def print_tabulate(self, example_batch):
        pass  # it takes most of the time of a start

    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])


def batches(seed: int = 0) -> list[dict[str, np.ndarray]]:
    x = np.random.default_rng(seed).normal(size=(2, 8, 3)).astype(np.float32)
    return [{"x": each, "y": each.sum(axis=1)} for each in x]


def trainer(module: nn.Module | None = None, **options: Any) -> Regression:
    options = {"enable_progress_bar": False, "optimizer": optax.sgd(0.05), **options}
    return Regression(module or Net(), **options)


def started(init_from: Any, module: nn.Module | None = None, **options: Any) -> Regression:
    options = {"root": None, "seed": 1, **options}
    return trainer(module, init_from=init_from, example_batch=batches()[0], **options)


def leaves(trained: Regression) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in named(trained.state).items()}


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert list(one) == list(other)
    for name, leaf in one.items():
        assert leaf.dtype == other[name].dtype
        assert leaf.tobytes() == other[name].tobytes(), name


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Regression:
    trained = trainer(root=str(tmp_path_factory.mktemp("weights")), name="net")
    trained.train_model(batches(), batches(1), num_epochs=2)
    return trained


@pytest.mark.parametrize("kind", ["run", "folder", "file", "state", "collections", "flat"])
@pytest.mark.slow
def test_init_from_takes_every_source(run: Regression, kind: str, tmp_path: Path) -> None:
    path, state = run.last_run.path, run.state
    assert path is not None
    sources = {
        "run": lambda: path,
        "folder": lambda: str(next((path / "checkpoints").glob(f"step_*{run.best.step}"))),
        "file": lambda: run.export_weights(tmp_path / "net.safetensors"),
        "state": lambda: state,
        "collections": lambda: {"params": state.params, "batch_stats": state.batch_stats},
        "flat": lambda: named(state),
    }
    new = started(sources[kind]())
    assert_same(leaves(new), leaves(run))
    np.testing.assert_array_equal(new.predict(batches()), run.predict(batches()))
    assert new.state.opt_state is None
    assert new.step == 0


@pytest.mark.slow
def test_weights_are_those_that_the_optimizer_evaluates_with() -> None:
    optimizer = optax.contrib.schedule_free_sgd(0.1)
    trained = trainer(optimizer=optimizer, name="free")
    trained.train_model(batches(), batches(1), num_epochs=2)
    evaluated = named(trained.evaluation_state())
    assert not np.array_equal(evaluated["head/kernel"], trained.state.params["head"]["kernel"])
    new = started(trained.last_run.path)
    np.testing.assert_array_equal(leaves(new)["head/kernel"], evaluated["head/kernel"])


def test_rename_and_only_load_a_part_of_the_model(run: Regression) -> None:
    fresh = leaves(started(None, Net(encoder="backbone")))
    how = InitFrom(
        run.last_run.path, rename={"^encoder/": "backbone/"}, only=("backbone/*", "batch_stats/*")
    )
    new = leaves(started(how, Net(encoder="backbone")))
    old = leaves(run)
    for name, leaf in new.items():
        is_loaded = name.startswith(("backbone/", "batch_stats/"))
        source = old[name.replace("backbone", "encoder")] if is_loaded else fresh[name]
        np.testing.assert_array_equal(leaf, source, name)


def test_error_names_each_leaf_that_differs(run: Regression) -> None:
    source = {**named(run.state), "extra/kernel": np.ones((2, 5), np.float32)}
    del source["head/bias"]
    with pytest.raises(CheckpointError) as caught:
        started(InitFrom(source, rename={"^encoder/": "body/"}), Net(width=6, encoder="body"))
    text = str(caught.value)
    for line in (
        "missing: 'head/bias', float32[1]",
        "unused: 'extra/kernel', float32[2, 5]",
        "other shape: 'body/kernel' (from 'encoder/kernel') is float32[3, 4] in the source, "
        "float32[3, 6] here",
        "other shape: 'body/bias' (from 'encoder/bias') is float32[4] in the source",
        "other shape: 'head/kernel' is float32[4, 1] in the source, float32[6, 1] here",
        "other shape: 'batch_stats/BatchNorm_0/mean' is float32[4]",
    ):
        assert line in text
    assert text.count("other shape") == 7
    assert not Path("runs").exists()


def test_missing_and_unused_are_allowed_only_where_asked_for(run: Regression) -> None:
    source = dict(named(run.state))
    kept = source.pop("head/bias") + 1
    source["extra"] = kept
    for how in ({"missing": "keep"}, {"unused": "ignore"}):
        with pytest.raises(CheckpointError, match=r"unused: 'extra'|missing: 'head/bias'"):
            started(InitFrom(source, **how))
    new = leaves(started(InitFrom(source, missing="keep", unused="ignore")))
    np.testing.assert_array_equal(new["head/bias"], leaves(started(None))["head/bias"])
    np.testing.assert_array_equal(new["head/kernel"], source["head/kernel"])
    with pytest.raises(CheckpointError, match="missing: 'head/kernel'"):  # of nothing at all
        started(InitFrom({"a": kept}, missing="keep", unused="ignore"))


def test_random_keys_are_no_weights(tmp_path: Path) -> None:
    key = jax.random.key(0)
    model = Variables({"w": jnp.zeros(2)}, None, {"rngs": {"dropout": key}})
    source = {"params": {"w": jnp.ones(2)}, "rngs": {"dropout": jax.random.key(1)}}
    path = export_weights(tmp_path / "x.safetensors", source)
    for each in (source, path):
        found = loaded(None, model, InitFrom(each)).variables
        assert found.params["w"].all()
        assert found.collections["rngs"]["dropout"] == key


def test_checkpoint_of_any_tree_has_its_names(tmp_path: Path) -> None:
    params = {
        "layers": [{"w": jnp.ones(2)}, {"w": jnp.full(3, 2, jnp.bfloat16)}],
        "pair": (1 + jnp.zeros(1), {}),
    }
    keys = {"rngs": {"key": jax.random.key(1)}}
    state = distaff.TrainState.create(params=params, collections=keys)
    with distaff.checkpoint.CheckpointStore(tmp_path) as store:
        folder = store.save(3, state.arrays(), {})
    model = Variables(
        jax.tree.map(jnp.zeros_like, params), None, {"rngs": {"key": jax.random.key(0)}}
    )
    found = loaded(None, model, InitFrom(folder)).variables
    assert jax.tree.structure(found) == jax.tree.structure(model)
    for leaf, other in zip(jax.tree.leaves(found.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(leaf, other)


def filled(value: np.ndarray, dtype: Any) -> Any:
    model = Variables({"w": jnp.zeros(value.shape, dtype)})
    return loaded(None, model, InitFrom({"w": value}))


def test_a_float_becomes_one_of_another_width_and_says_so() -> None:
    x = np.float32([1.001, -3e38, 0])
    found = filled(x, jnp.bfloat16)
    np.testing.assert_array_equal(found.variables.params["w"], jnp.asarray(x, jnp.bfloat16))
    assert found.text.endswith("1 converted float32 -> bfloat16")
    half = np.asarray([1.5], jnp.bfloat16)
    assert filled(half, jnp.float32).variables.params["w"] == 1.5


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (np.ones(2, np.int32), jnp.float32),
        (np.ones(2, np.int32), jnp.int8),
        (np.ones(2, np.float16), jnp.bfloat16),
        (np.ones(2, bool), jnp.uint8),
        (np.ones(2, np.complex64), jnp.float32),
    ],
)
def test_no_other_dtype_is_converted(value: np.ndarray, dtype: Any) -> None:
    with pytest.raises(CheckpointError, match="other dtype: 'w' is"):
        filled(value, dtype)


def test_a_finite_number_never_becomes_infinite() -> None:
    with pytest.raises(CheckpointError, match="numbers that float16 cannot hold"):
        filled(np.float32([1e6]), jnp.float16)
    assert np.isinf(filled(np.float32([np.inf]), jnp.float16).variables.params["w"])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"rename": {"(": "x"}}, "regular expressions"),
        ({"rename": {"a": r"\1"}}, "template"),
        ({"rename": "a"}, "rename is a dict"),
        ({"rename": {"nothing": "x"}}, "without effect"),
        ({"rename": {"bias|kernel": "x"}}, "same name twice"),
        ({"only": "^encoder/(.*)"}, "shell pattern"),
        ({"only": 3}, "shell pattern"),
        ({"missing": "kep"}, "Did you mean 'keep'"),
        ({"unused": "no"}, "Known: 'error', 'ignore'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], complaint: str) -> None:
    source = {"encoder": {"kernel": np.ones((3, 4)), "bias": np.ones(4)}, "head": np.ones(3)}
    with pytest.raises((ConfigError, CheckpointError), match=complaint.replace("(", r"\(")):
        started(InitFrom(source, **options))


@pytest.mark.parametrize("source", ["nowhere", "nowhere.safetensors", {}, {"a": "text"}, 3])
def test_sources_that_are_none_are_refused(source: Any) -> None:
    with pytest.raises(DistaffError):
        started(source)


@pytest.mark.slow
def test_record_says_where_the_weights_are_from(run: Regression) -> None:
    path = run.last_run.path
    new = trainer(init_from=InitFrom(path, rename={"^enc": "enc"}, unused="ignore"), name="new")
    with pytest.raises(CheckpointError, match="without effect"):
        new.train_model(batches(), num_epochs=1)
    new = trainer(init_from=path, name="new")
    new.train_model(batches(), num_epochs=1)
    config = json.loads((new.last_run.path / "config.json").read_text())
    assert config["init_from"] == {
        "source": str(path),
        "rename": {},
        "only": ["*"],
        "missing": "error",
        "unused": "error",
    }
    assert f"weights from {path}" in (new.last_run.path / "log.txt").read_text()
    of_tree = trainer(init_from=run.state, name="tree")
    record = of_tree.init_from.record()
    assert json.loads(json.dumps(record))["source"]["head/kernel"] == "float32[4, 1]"
    loaded_again = Regression.load_from_checkpoint(new.last_run.path, Net)
    assert loaded_again.init_from is None


class Stop(distaff.Callback):
    """Ends a run as a crash does, at a step; never, at none."""

    def __init__(self, step: int | None = None) -> None:
        self.step = step

    def on_checkpoint(self, info: Any) -> None:
        if info.step == self.step:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_resumed_run_has_the_weights_of_its_checkpoint(run: Regression, tmp_path: Path) -> None:
    source = run.export_weights(tmp_path / "net.safetensors")
    options = {"init_from": source, "name": "resumed"}
    straight = trainer(**{**options, "name": "straight"})
    straight.train_model(batches(), num_epochs=3)
    with pytest.raises(KeyboardInterrupt):
        trainer(callbacks=[Stop(4)], **options).train_model(batches(), num_epochs=3)
    export_weights(source, {name: 0 * leaf for name, leaf in leaves(run).items()})  # now another
    again = trainer(callbacks=[Stop()], resume="must", allow_changes=True, **options)
    with pytest.warns(UserWarning, match="start weights differ"):
        assert again.train_model(batches(), num_epochs=3).path.name == "0001"
    assert_same(leaves(again), leaves(straight))


@pytest.mark.slow
def test_a_resumed_run_does_without_the_source(run: Regression, tmp_path: Path) -> None:
    source = run.export_weights(tmp_path / "net.safetensors")
    options = {"init_from": source, "name": "resumed"}
    with pytest.raises(KeyboardInterrupt):
        trainer(callbacks=[Stop(2)], **options).train_model(batches(), num_epochs=2)
    source.unlink()
    again = trainer(example_batch=batches()[0], callbacks=[Stop()], **options)
    assert again.train_model(batches(), num_epochs=2).step == 4
    assert again.train_model(batches(), num_epochs=1).step == 6  # a run that begins with the last
    with pytest.raises(CheckpointError, match="regular file"):  # a new one needs it
        trainer(**options).train_model(batches(), num_epochs=2)
    assert sorted(path.name for path in Path("runs/resumed").iterdir()) == ["0001", "0002"]


@pytest.mark.slow
def test_a_run_beside_one_that_cannot_be_gone_on_with_needs_the_source() -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(callbacks=[Stop(2)], name="other").train_model(batches(), num_epochs=2)
    new = trainer(init_from="gone.safetensors", name="other")
    with pytest.raises(CheckpointError, match="regular file"):
        new.train_model(batches(), num_epochs=1)


@pytest.mark.slow
def test_frozen_weights_keep_their_bits(run: Regression) -> None:
    frozen = OptimizerConfig(
        "adamw", weight_decay=0.1, groups=(ParamGroup("encoder/*", freeze=True),)
    )
    new = started(run.last_run.path, optimizer=frozen)
    new.train_model(batches(), num_epochs=2)
    old, tuned = leaves(run), leaves(new)
    for name in ("encoder/kernel", "encoder/bias"):
        assert old[name].tobytes() == tuned[name].tobytes()
    assert (old["head/kernel"] != tuned["head/kernel"]).all()


def test_round_trip_is_equal_bit_for_bit(tmp_path: Path) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    tree = {
        "bf16": jnp.asarray(bits.view(jnp.bfloat16)),
        "half": jnp.asarray(bits.view(np.float16)).reshape(2, -1),
        "turned": np.arange(12.0, dtype=np.float32).reshape(3, 4).T,
        "big_endian": np.arange(3, dtype=">i4"),
        "scalar": jnp.float32(3.5),
        "none": np.zeros((0, 4), np.int8),
        "mask": np.array([True, False]),
    }
    path = export_weights(tmp_path / "deep" / "all.safetensors", tree)
    found = load_file(path)
    assert found.keys() == tree.keys()
    for name, leaf in tree.items():
        leaf = np.asarray(leaf, order="C")
        assert found[name].shape == leaf.shape
        assert found[name].tobytes() == leaf.astype(leaf.dtype.newbyteorder("<")).tobytes()
    zeros = jax.tree.map(lambda x: np.zeros_like(x, np.asarray(x).dtype.newbyteorder("=")), tree)
    back = loaded(None, Variables(zeros), InitFrom(path)).variables.params
    for name, leaf in back.items():
        assert np.asarray(leaf).tobytes() == found[name].tobytes()


def test_a_file_of_the_library_loads(tmp_path: Path) -> None:
    x = jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)
    save_flax({"model.layer.weight": x}, str(tmp_path / "theirs.safetensors"))
    how = InitFrom(tmp_path / "theirs.safetensors", rename={r"\.": "/", "weight$": "kernel"})
    model = Variables({"model": {"layer": {"kernel": jnp.zeros((2, 3), jnp.bfloat16)}}})
    found = loaded(None, model, how).variables.params["model"]["layer"]["kernel"]
    np.testing.assert_array_equal(found, x)


def test_export_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = export_weights(tmp_path / "a.safetensors", {"a": np.ones(2)})
    before = path.read_bytes()
    assert oct(path.stat().st_mode & 0o777) == "0o664"

    def fails(*arguments: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(CheckpointError, match="no space"):
        export_weights(path, {"a": np.zeros(2)})
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("path", "tree", "complaint"),
    [
        ("a.bin", {"a": np.ones(2)}, "ends in .safetensors"),
        ("a.safetensors", {"a": np.ones(2, np.complex128)}, "'a' is complex128"),
        ("a.safetensors", {"a/b": np.ones(2), "a": {"b": np.ones(2)}}, "two are called 'a/b'"),
    ],
)
def test_export_refuses(path: str, tree: Any, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        export_weights(path, tree)


def test_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(__import__("sys").modules, "distaff.integrations.safetensors", False)
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(MissingExtraError, match=r"distaff\[safetensors\]"):
        export_weights("a.safetensors", {"a": np.ones(2)})


MODEL = Variables({"a": jnp.zeros((2, 3)), "b": {"c": jnp.zeros(4, jnp.bfloat16)}})

sizes = st.integers(-1, 5) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30])
words = st.sampled_from(["a", "b/c", "..", "/etc/passwd", "\0", "__metadata__", "a" * 300])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", "F8_E4M3", "I64", "BOOL", "", "f32"]),
        "shape": st.lists(sizes, max_size=70),
        "data_offsets": st.lists(sizes | st.integers(0, 40), min_size=1, max_size=3),
    }
)
headers = st.dictionaries(words, entries | st.just({}) | st.integers(), max_size=4)


def safetensors_file(header: bytes, data: bytes, claimed: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if claimed is None else claimed) + header + data


WHOLE = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b/c": {"dtype": "F32", "shape": [4], "data_offsets": [24, 40]},
}
GOOD = safetensors_file(json.dumps(WHOLE).encode(), bytes(40))
EMPTY = {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}


@given(
    st.binary(max_size=60)
    | st.builds(
        safetensors_file,
        headers.map(lambda header: json.dumps(header).encode()) | st.binary(max_size=40),
        st.binary(max_size=48),
        st.none() | st.integers(0, 2**64 - 1),
    )
    | st.builds(
        lambda at, byte: GOOD[:at] + bytes([byte]) + GOOD[at + 1 :],
        st.integers(0, len(GOOD) - 1),
        st.integers(0, 255),
    )
    | st.builds(lambda end: GOOD[:end], st.integers(0, len(GOOD)))
)
@example(GOOD)
@example(safetensors_file(json.dumps({"a": EMPTY}).encode(), b""))
@example(safetensors_file(b"[" * 100_000, b""))
@example(safetensors_file(b"{}", b"", 2**63))
@settings(
    deadline=None,
    max_examples=int(os.environ.get("DISTAFF_FUZZ_EXAMPLES", "200")),
    suppress_health_check=[HealthCheck.too_slow],
)
def test_hostile_file_loads_or_is_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(content)
        try:
            found = loaded(None, MODEL, InitFrom(path)).variables.params
        except CheckpointError:
            return
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(
        lambda x: (x.shape, x.dtype), MODEL.params
    )


def test_good_file_of_the_fuzz_loads(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(GOOD)
    assert loaded(None, MODEL, InitFrom(tmp_path / "x.safetensors")).text.endswith("bfloat16")


@pytest.mark.parametrize("damage", ["truncated", "metadata"])
def test_damaged_checkpoint_is_refused(run: Regression, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run.last_run.path, copy)
    folder = next((copy / "checkpoints").glob("step_*"))
    for other in (copy / "checkpoints").glob("step_*"):
        if other != folder:
            shutil.rmtree(other)
    if damage == "truncated":
        data = max((folder / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
        data.write_bytes(data.read_bytes()[:-1])
    else:
        for path in folder.rglob("_METADATA"):
            path.write_text('{"tree_metadata": 3}')
        (folder / "distaff_manifest.json").unlink()
    with pytest.raises(CheckpointError):
        started(folder)


def test_save_file_is_what_export_compares_with(tmp_path: Path) -> None:
    arrays = {"b": np.ones(3, np.float32), "a": np.zeros((2, 2), np.int32)}
    save_file(arrays, tmp_path / "theirs.safetensors")
    ours = export_weights(tmp_path / "ours.safetensors", arrays)
    assert ours.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()

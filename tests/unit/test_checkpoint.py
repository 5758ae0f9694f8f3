"""What a checkpoint keeps, which ones are kept, and what is said where one does not fit."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.checkpoint import CheckpointStore, NullStore, arrays, best_steps, expired, find
from distaff.errors import CheckpointError, ConfigError


class Counters(NamedTuple):
    seen: jax.Array
    skipped: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Total:
    value: jax.Array
    missing: None = None


def make_state(scale: float = 1.0) -> dict[str, Any]:
    params = {
        "Dense_0": {"kernel": scale * jnp.arange(6.0).reshape(3, 2) / 7, "bias": None},
        "half": jnp.array([1.5, -2.25], jnp.bfloat16) * scale,
    }
    return {
        "step": jnp.int32(7),
        "params": params,
        "opt_state": optax.adamw(1e-3).init(params),
        "batch_stats": {},
        "rng": jax.random.key(5),
        "counters": Counters(jnp.uint8(3), jnp.array([True, False])),
        "total": Total(jnp.float16(2.5)),
        "host": np.array([2**40, -1]),
    }


def abstract_of(state: Any) -> Any:
    return jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, np.ndarray) else jax.eval_shape(lambda: leaf), state
    )


def bits(leaf: Any) -> tuple[str, bytes]:
    plain = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return str(leaf.dtype), np.asarray(plain).tobytes()


def assert_same_bits(tree: Any, other: Any) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    assert [bits(leaf) for leaf in jax.tree.leaves(tree)] == [
        bits(leaf) for leaf in jax.tree.leaves(other)
    ]


def save(store: CheckpointStore, *steps: int, best_step: int | None = None) -> None:
    for step in steps:
        store.save(step, {"x": jnp.full(3, float(step))}, {"best_step": best_step})
    store.wait()


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in [folder, *folder.rglob("*")]
    }


def test_load_gives_back_bits_dtypes_and_structure(tmp_path: Path) -> None:
    state = make_state()
    with CheckpointStore(tmp_path) as store:
        store.save(7, state, {})
    loaded = CheckpointStore(tmp_path).load(7, abstract_of(state))
    assert_same_bits(loaded, state)
    assert type(loaded["opt_state"][0]) is type(state["opt_state"][0])
    assert type(loaded["host"]) is np.ndarray
    assert jax.random.bits(loaded["rng"]) == jax.random.bits(state["rng"])


def test_load_reads_only_the_keys_asked_for(tmp_path: Path) -> None:
    state = make_state()
    with CheckpointStore(tmp_path) as store:
        store.save(7, state, {})
    wanted = {"params": state["params"], "batch_stats": {}}
    assert_same_bits(store.load(7, abstract_of(wanted)), wanted)


def test_save_takes_numbers_as_jit_does(tmp_path: Path) -> None:
    state = {"epoch": 3, "rate": np.float32(0.5)}
    with CheckpointStore(tmp_path) as store:
        store.save(1, state, {})
    loaded = store.load(1, jax.eval_shape(lambda: state))
    assert (int(loaded["epoch"]), float(loaded["rate"])) == (3, 0.5)


def test_info_is_what_was_passed_at_the_time_of_the_save(tmp_path: Path) -> None:
    info = {"epoch": 2, "metrics": {"val/loss": 0.1}, "best_step": None, "loader": [1, "a"]}
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"x": jnp.ones(2)}, info)
        info["metrics"]["val/loss"] = 9.0
    assert store.info(1) == {**info, "metrics": {"val/loss": 0.1}}


def test_save_keeps_the_values_of_buffers_donated_afterwards(tmp_path: Path) -> None:
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    x, host = jnp.arange(2**21, dtype=jnp.float32), np.arange(2**18)
    expected, expected_host = np.array(x), host.copy()
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"x": x, "host": host}, {})
        host[:] = -1
        for _ in range(5):
            x = overwrite(x)
    loaded = store.load(1, {"x": np.zeros_like(expected), "host": host})
    np.testing.assert_array_equal(loaded["x"], expected)
    np.testing.assert_array_equal(loaded["host"], expected_host)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda params: {**params, "half": jnp.ones(3, jnp.bfloat16)},
            "'params/half' is bfloat16[2] in the checkpoint, bfloat16[3] in the model",
        ),
        (
            lambda params: {**params, "half": jnp.ones(2, jnp.float32)},
            "'params/half' is bfloat16[2] in the checkpoint, float32[2] in the model",
        ),
        (
            lambda params: {**params, "extra": {"bias": jnp.ones(4)}},
            "'params/extra/bias' (float32[4] in the model) is missing in the checkpoint",
        ),
        (
            lambda params: {"half": params["half"]},
            "'params/Dense_0/kernel' (float32[3, 2] in the checkpoint) is unexpected",
        ),
    ],
)
def test_load_of_another_model_names_the_leaf(tmp_path: Path, change: Any, words: str) -> None:
    state = make_state()
    with CheckpointStore(tmp_path) as store:
        store.save(7, state, {})
    with pytest.raises(CheckpointError, match="is of another model") as raised:
        store.load(7, {**state, "params": change(state["params"])})
    assert words in str(raised.value)


def test_load_of_a_key_that_was_not_saved_names_its_leaf(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        save(store, 1)
    with pytest.raises(CheckpointError, match=r"'y/z' \(float32\[\] in the model\) is missing"):
        store.load(1, {"y": {"z": jnp.zeros(())}})


def test_load_of_a_step_that_is_not_there_lists_the_steps(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, keep_last=2) as store:
        save(store, 10, 20)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 15 .*10, 20"):
        store.load(15, {})


def test_store_writes_nothing_before_the_first_save(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "checkpoints") as store:
        assert (store.steps(), store.latest(), store.best()) == ((), None, None)
    assert list(tmp_path.iterdir()) == []


def test_store_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, keep_last=1) as store:
        save(store, 10, best_step=10)
        save(store, 20, best_step=20)
        save(store, 30, 40, best_step=20)
        assert (store.steps(), store.best(), store.latest()) == ((20, 40), 20, 40)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "step_00000020",
            "step_00000040",
        ]
        save(store, 50, best_step=50)
        assert store.steps() == (50,)


def test_best_is_none_where_its_folder_is_gone(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        save(store, 10, 20, best_step=10)
    shutil.rmtree(tmp_path / "step_00000010")
    assert store.best() is None
    assert find(tmp_path) == (tmp_path, 20)


def test_removal_that_is_cut_short_leaves_no_step_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree

    def refuse(folder: Path, **options: bool) -> None:
        if folder.suffix == ".expired":
            raise OSError("busy")
        remove(folder, **options)

    with CheckpointStore(tmp_path, keep_last=1) as store:
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "rmtree", refuse)
            save(store, 1, 2, 3)
        assert store.steps() == (3,)
        save(store, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]


def test_steps_ignores_what_is_no_whole_checkpoint(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, keep_last=3) as store:
        save(store, 5, 123456789)
    (tmp_path / "step_00000006" / "state").mkdir(parents=True)
    (tmp_path / "step_00000007").write_text("a file")
    shutil.copytree(tmp_path / "step_00000005", tmp_path / "step_00000008.orbax-checkpoint-tmp")
    shutil.copytree(tmp_path / "step_00000005", tmp_path / "best")
    assert store.steps() == (5, 123456789)


def test_save_of_the_same_step_again_changes_nothing(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        first = store.save(3, {"x": jnp.ones(2)}, {})
        assert store.save(3, {"x": jnp.zeros(2)}, {}) == first
        store.wait()
        before = snapshot(tmp_path)
        assert store.save(3, {"x": jnp.zeros(2)}, {}) == first
    assert snapshot(tmp_path) == before


def test_save_of_an_earlier_step_is_refused(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        save(store, 40)
        with pytest.raises(CheckpointError, match="step 20 comes before step 40"):
            save(store, 20)
    assert store.steps() == (40,)


def test_save_refuses_what_a_checkpoint_cannot_hold(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(CheckpointError, match="'params/name' is a str"):
            store.save(1, {"params": {"name": "cnn"}}, {})
        with pytest.raises(CheckpointError, match=r"'loss' is nan .*None"):
            store.save(1, {"x": jnp.ones(1)}, {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="keep_last is 0"):
        CheckpointStore(tmp_path, keep_last=0)


def test_find_gives_the_best_of_a_run_else_the_newest(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    with CheckpointStore(directory) as store:
        save(store, 1, 2)
        assert find(tmp_path) == (directory, 2)
        save(store, 3, best_step=3)
        save(store, 4, best_step=3)
    assert find(tmp_path) == find(directory) == (directory, 3)
    assert find(directory / "step_00000004") == (directory, 4)


def test_find_lists_what_is_there_instead(tmp_path: Path) -> None:
    (tmp_path / "step_00000006").mkdir()
    with pytest.raises(CheckpointError, match=r"holds step_00000006\. Pass a run directory"):
        find(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        find(tmp_path / "absent")


def test_loading_leaves_a_moved_read_only_folder_untouched(tmp_path: Path) -> None:
    state = make_state()
    with CheckpointStore(tmp_path / "run" / "checkpoints") as store:
        store.save(7, state, {"best_step": 7})
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    folders = [moved, *(path for path in moved.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    before = snapshot(moved)
    directory, step = find(moved)
    loaded = CheckpointStore(directory).load(step, abstract_of(state))
    after = snapshot(moved)
    for folder in folders:
        folder.chmod(0o755)
    assert_same_bits(loaded, state)
    assert after == before


def test_null_store_knows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = NullStore()
    store.save(1, {"x": jnp.ones(1)}, {})
    store.wait()
    store.close()
    assert (store.steps(), store.latest(), store.best()) == ((), None, None)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="keeps no checkpoints"):
        store.load(1, {})


@settings(deadline=None)
@given(
    steps=st.sets(st.integers(0, 50)),
    keep_last=st.integers(1, 5),
    best=st.lists(st.integers(0, 50), max_size=3),
    keep_every=st.none() | st.integers(1, 20),
)
def test_expired_never_takes_the_newest_the_best_or_the_multiples(
    steps: set[int], keep_last: int, best: list[int], keep_every: int | None
) -> None:
    rules = {"keep_last": keep_last, "best": best, "keep_every": keep_every}
    gone = expired(steps, **rules)
    kept = steps - set(gone)
    newest = set(sorted(steps, reverse=True)[:keep_last])
    multiples = {step for step in steps if keep_every is not None and step % keep_every == 0}
    assert list(gone) == sorted(set(gone))
    assert kept == newest | ({*best} & steps) | multiples
    assert expired(kept, **rules) == ()


def test_best_steps_wins_over_best_step() -> None:
    assert best_steps({}) == best_steps({"best_step": None}) == ()
    assert best_steps({"best_step": 3}) == (3,)
    assert best_steps({"best_step": 3, "best_steps": [5, 2]}) == (5, 2)
    assert best_steps({"best_steps": "no list"}) == best_steps({"best_steps": [None, "x"]}) == ()


def test_store_keeps_several_best_and_multiples(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, keep_last=1, keep_every=40) as store:
        for step in (10, 20, 30, 40, 50, 60):
            store.save(step, {"x": jnp.ones(1)}, {"best_steps": [20, 10], "best_step": 30})
            store.wait()
        assert (store.steps(), store.best()) == ((10, 20, 40, 60), 20)
    with pytest.raises(ConfigError, match="keep_every is 0"):
        CheckpointStore(tmp_path, keep_every=0)


def test_save_keeps_what_the_arrays_were_when_it_returned(tmp_path: Path) -> None:
    step = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    given, host = jnp.arange(2.0**16), np.arange(3.0)
    key = jax.random.key(3)
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"x": given, "host": host, "key": key}, {})
        for _ in range(5):
            given = step(given)  # gives the buffer away
        host[:] = -1
    loaded = store.load(1, {"x": given, "host": host, "key": key})
    np.testing.assert_array_equal(loaded["x"], np.arange(2.0**16))
    np.testing.assert_array_equal(loaded["host"], np.arange(3.0))
    assert jax.random.key_data(loaded["key"]).tolist() == jax.random.key_data(key).tolist()


def test_save_does_not_wait_for_what_orbax_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    write = arrays.write

    def slow(*args: object, **options: object) -> None:
        assert go.wait(30)
        write(*args, **options)

    monkeypatch.setattr(arrays, "write", slow)
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"x": jnp.ones(3)}, {})
        assert store.latest() is None
        go.set()
    assert store.latest() == 1


def test_info_that_could_not_be_read_again_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match=r"at most 16777216 bytes.*most of them in 'rows'"):
        store.save(1, {"x": jnp.zeros(2)}, {"epoch": 1, "rows": "a" * 2**24})
    store.save(1, {"x": jnp.zeros(2)}, {"epoch": 1, "rows": "a" * (2**24 - 99)})
    store.close()
    assert store.check(1) is None
    assert len(store.info(1)["rows"]) == 2**24 - 99

"""The search for the largest batch: few compiles, the compiler's memory, and one step that runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from distaff import OptimizerConfig, data, tune, zoo
from distaff.errors import BatchError, ConfigError
from distaff.execution import device_memory
from distaff.execution.placement import OneDevice
from distaff.tasks import Classifier
from distaff.tune import batch_size
from distaff.tune.batch_size import _largest, _rounded

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(512, 64))
Y = RANDOM.integers(3, size=512)
FULL = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
find = tune.find_batch_size


def classifier(**options: Any) -> Classifier:
    options = {"optimizer": OptimizerConfig("adamw"), **options}
    return Classifier(zoo.MLP((16, 3)), enable_progress_bar=False, **options)


@pytest.mark.parametrize("start", [1, 32, 500])
@pytest.mark.parametrize(("fixed", "each"), [(0, 7), (1000, 1), (10, 1000), (9_990, 3)])
def test_search_finds_the_largest_with_few_compiles(start: int, fixed: int, each: int) -> None:
    limit, most, tried = 10_000, 10_000, dict[int, int]()

    def fits(size: int) -> bool:
        assert size not in tried
        tried[size] = fixed + each * size
        return tried[size] <= limit

    found = _largest(fits, lambda: [(n, limit - tried[n]) for n in sorted(tried)], start, most)
    assert found == _rounded((limit - fixed) // each)
    assert len(tried) <= 5 + (found < start)


def test_search_ends_for_memory_that_is_no_line() -> None:
    for seed in range(200):
        random = np.random.default_rng(seed)
        most = int(random.integers(1, 3000))
        by_size = np.cumsum(random.integers(0, 50, size=most + 1))
        limit, tried = int(random.integers(0, 40_000)), set[int]()

        def fits(size: int, tried=tried, limit=limit, by_size=by_size) -> bool:
            tried.add(size)
            return by_size[size] <= limit

        found = _largest(
            fits,
            lambda tried=tried, by_size=by_size, limit=limit: [
                (n, int(limit - by_size[n])) for n in sorted(tried)
            ],
            32,
            most,
        )
        assert found == max((n for n in tried if by_size[n] <= limit), default=0)
        assert len(tried) <= 20
        assert found or by_size[1] > limit


def test_sizes_have_few_digits() -> None:
    assert [_rounded(n) for n in (0, 1, 15, 17, 35, 36, 1000)] == [0, 1, 15, 16, 32, 36, 960]
    assert all(n - _rounded(n) <= n / 8 for n in range(1, 5000))


@pytest.mark.slow
def test_found_batch_is_within_the_limit_of_the_compiler() -> None:
    limit = 150_000
    found = find(classifier(), (X, Y), limit_bytes=limit)
    sizes = {each.batch_size: each for each in found.tried}
    assert sizes[found.batch_size].ran
    assert sizes[found.batch_size].needed_bytes <= limit
    assert 64 < found.batch_size < 512
    # As the step of a run says, with one step per call.
    trainer = classifier(example_batch=(X[:32].astype(np.float32), Y[:32].astype(np.int32)))
    trainer.init_optimizer(10)
    shapes = [(found.batch_size * scale // 8, *a.shape[1:]) for scale in (8, 9) for a in (X, Y)]
    dtypes = [np.float32, np.int32] * 2
    batch = list(map(jax.ShapeDtypeStruct, shapes, dtypes))
    program = trainer.train_step.program
    needed, more = (
        device_memory.program_bytes(program.lower(trainer.state, tuple(each)).compile())
        for each in (batch[:2], batch[2:])
    )
    assert needed == pytest.approx(sizes[found.batch_size].needed_bytes, rel=0.02)
    assert more > 0.98 * limit


@pytest.mark.slow
def test_options_of_a_run_count() -> None:
    def needed(**options: Any) -> int:
        found = find(classifier(**options), (X, Y), most=32, attempt=False)
        assert found.batch_size == 32
        assert found.remark == "the largest one considered"
        (only,) = found.tried
        assert only.ran is None
        return only.needed_bytes

    params = 4 * (64 * 16 + 16 + 16 * 3 + 3)
    plain = needed()
    assert plain > 3 * params + 4 * 32 * 65  # weights, two moments, a batch
    assert needed(ema=0.9) >= plain + params
    assert needed(optimizer=OptimizerConfig("adamw", accumulate=2)) >= plain + params


def test_a_step_without_memory_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    ready, failures = jax.block_until_ready, [FULL, MemoryError("host")]

    def wait(tree: Any) -> Any:
        if failures:
            raise failures.pop()
        return ready(tree)

    monkeypatch.setattr(batch_size.jax, "block_until_ready", wait)
    found = find(classifier(), (X, Y), most=64, limit_bytes=2**30)
    assert found.batch_size == 16
    assert {each.batch_size: each.ran for each in found.tried} == {64: False, 32: False, 16: True}
    assert found.table().splitlines()[-1].split()[-3:] == ["out", "of", "memory"]


def test_other_errors_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(tree: Any) -> Any:
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(batch_size.jax, "block_until_ready", wait)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        find(classifier(), (X, Y), most=16)


def test_trainer_and_loader_do_not_change(tmp_path: Path) -> None:
    trainer = classifier(root=str(tmp_path), name="here")
    loader = data.ArrayLoader((X[:64], Y[:64]), 32, shuffle=True, seed=1)
    trainer.train_model(loader, num_epochs=1)
    state, position, files = trainer.state, loader.get_state(), sorted(tmp_path.rglob("*"))
    before = jax.tree.map(np.array, state.params)
    find(trainer, loader, most=32)
    assert trainer.state is state
    assert loader.get_state() == position
    assert sorted(tmp_path.rglob("*")) == files
    jax.tree.map(np.testing.assert_array_equal, before, state.params)


def test_result_is_shown() -> None:
    rows = (
        tune.TriedBatch(32, 3 * 2**20, True),
        tune.TriedBatch(1200, 2**30, True, True),
        tune.TriedBatch(4096, None, False),
    )
    found = tune.BatchSizeSearch(batch_size=1200, limit_bytes=2**31, tried=rows)
    assert repr(found) == "BatchSizeSearch(batch size 1200, 1 GiB of 2 GiB)"
    assert found.power_of_two == 1024
    assert found.table().splitlines() == [
        "batch size  memory  fits  ran",
        "        32   3 MiB   yes    -",
        "     1,200   1 GiB   yes  yes",
        "     4,096       -    no    -",
    ]


@pytest.mark.parametrize(
    ("options", "arguments", "error", "text"),
    [
        ({}, {"limit_bytes": 0}, ConfigError, "limit_bytes must be an integer, at least 1; got 0"),
        ({}, {"most": 0.5}, ConfigError, "most must be an integer"),
        ({}, {"limit_bytes": 1000}, ConfigError, "with 1 example needs"),
        ({"debug": True}, {}, ConfigError, "debug=True"),
        ({}, {"train_loader": data.OnPolicy([(X, Y)])}, BatchError, "OnPolicy"),
    ],
)
def test_bad_input_raises(options: Any, arguments: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        find(classifier(**options), **{"train_loader": (X, Y), **arguments})


def test_a_trainer_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"find_batch_size takes a trainer.*got 3"):
        find(3, (X, Y))  # ty: ignore[invalid-argument-type]


class Device:
    def __init__(self, platform: str, stats: Any) -> None:
        self.platform, self.stats = platform, stats

    def memory_stats(self) -> Any:
        return self.stats


def test_free_bytes_of_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def free(platform: str, stats: Any) -> int:
        monkeypatch.setattr(jax, "local_devices", lambda: [Device(platform, stats)])
        return device_memory.free_bytes()

    assert free("cuda", {"bytes_limit": 100, "bytes_in_use": 30}) == 70
    with pytest.raises(ConfigError, match=r"memory of this tpu device is not known\. Pass"):
        free("tpu", None)
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    3 kB\n")
    monkeypatch.setattr(device_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(device_memory, "_CGROUP", tmp_path)
    assert free("cpu", None) == 3 * 1024
    (tmp_path / "memory.max").write_text("2000\n")
    (tmp_path / "memory.current").write_text("500\n")
    assert free("cpu", None) == 1500
    (tmp_path / "memory.max").write_text("max\n")
    assert free("cpu", None) == 3 * 1024


def test_arrays_that_stay_on_the_device_count(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = data.ArrayLoader((X, Y), 32)
    monkeypatch.setattr(batch_size, "free_bytes", lambda: 10_000_000)
    programs = batch_size._Programs(classifier(), data.first_batch(loader))
    assert programs.free_bytes(loader) == 9_000_000
    monkeypatch.setattr(OneDevice, "gathers", True)
    assert programs.free_bytes(loader) == 9_000_000 - sum(x.nbytes for x in loader.arrays)
    assert programs.free_bytes([(X, Y)]) == 9_000_000


def test_out_of_memory_is_recognized() -> None:
    assert device_memory.is_out_of_memory(FULL)
    assert device_memory.is_out_of_memory(MemoryError())
    assert not device_memory.is_out_of_memory(ValueError("RESOURCE_EXHAUSTED"))

"""FLOPs of a program, and the peak of the machine they are compared with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.execution import compile_cache, peak_flops
from distaff.execution.flops import Flops, flops_of

MATRIX = jax.ShapeDtypeStruct((32, 32), np.float32)


@pytest.fixture(autouse=True)
def machine_file(monkeypatch) -> Path:
    """Where the peak, which is fast to measure here, is remembered."""
    monkeypatch.setattr(peak_flops, "_SIZES", (16, 32))
    return Path(os.environ["XDG_CACHE_HOME"], "distaff", "machine.json")


def test_flops_of_a_product_are_exact_and_nothing_compiles():
    program = jax.jit(jnp.matmul)
    assert flops_of(program, MATRIX, MATRIX) == Flops(2 * 32**3, at_least=False)
    assert program._cache_size() == 0


@pytest.mark.parametrize("kind", ["scan", "while"])
def test_flops_of_a_loop_are_a_lower_bound(kind):
    def loop(x):
        if kind == "scan":
            return jax.lax.scan(lambda x, _: (x @ x, None), x, length=10)[0]
        return jax.lax.while_loop(lambda x: x[0, 0] > 1, lambda x: x @ x, x)

    flops = flops_of(jax.jit(lambda x: jax.jit(loop)(x)), MATRIX)
    assert flops is not None
    assert flops.at_least
    assert 2 * 32**3 <= flops.count < 4 * 32**3


def test_flops_that_nobody_knows_are_none(monkeypatch):
    assert flops_of(jnp.matmul.__wrapped__, MATRIX, MATRIX) is None
    program = jax.jit(jnp.matmul)
    for analysis in (lambda self: None, lambda self: {}, lambda self: {"flops": -1.0}):
        monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", analysis)
        assert flops_of(program, MATRIX, MATRIX) is None

    def broken(self):
        raise NotImplementedError("no analysis on this backend")

    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", broken)
    assert flops_of(program, MATRIX, MATRIX) is None


def test_peak_is_measured_once_and_remembered(machine_file, monkeypatch):
    peak = peak_flops.peak_flops()
    assert peak is not None
    assert peak > 0
    ((key, remembered),) = json.loads(machine_file.read_text()).items()
    assert remembered == peak
    assert all(part in key for part in ("cpu", f"jax {jax.__version__}", "precision default"))
    assert machine_file.parent == compile_cache.home()
    assert [entry.name for entry in machine_file.parent.iterdir()] == ["machine.json"]

    monkeypatch.setattr(peak_flops, "_measure", lambda: pytest.fail("measured again"))
    assert peak_flops.peak_flops() == peak


def test_peak_of_another_precision_is_another_one(machine_file, monkeypatch):
    peaks = iter([1.0, 2.0])
    monkeypatch.setattr(peak_flops, "_measure", lambda: next(peaks))
    assert peak_flops.peak_flops() == 1
    with jax.default_matmul_precision("highest"):
        assert peak_flops.peak_flops() == 2
    assert peak_flops.peak_flops() == 1
    assert sorted(json.loads(machine_file.read_text()).values()) == [1, 2]


def test_peak_measured_again_is_the_highest(monkeypatch):
    peaks = iter([2.0, 1.0, 3.0])
    monkeypatch.setattr(peak_flops, "_measure", lambda: next(peaks))
    assert [peak_flops.peak_flops(again=True) for _ in range(3)] == [2, 2, 3]


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '{"%s": -1}', '{"%s": "1"}', '{"%s": NaN}'])
def test_corrupt_memory_is_measured_anew(machine_file, monkeypatch, text):
    machine_file.parent.mkdir(parents=True)
    machine_file.write_text(text.replace("%s", peak_flops._key()))
    monkeypatch.setattr(peak_flops, "_measure", lambda: 5.0)
    assert peak_flops.peak_flops() == 5
    assert json.loads(machine_file.read_text()) == {peak_flops._key(): 5}


def test_peak_without_a_place_is_measured_and_not_remembered(machine_file, monkeypatch):
    machine_file.parent.parent.mkdir()
    machine_file.parent.write_text("in the way")
    assert peak_flops.peak_flops()
    machine_file.parent.unlink()
    machine_file.mkdir(parents=True)  # a folder where the file should be
    assert peak_flops.peak_flops()
    assert list(machine_file.parent.iterdir()) == [machine_file]


def test_peak_that_cannot_be_measured_is_none(monkeypatch):
    def broken():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(peak_flops, "_measure", broken)
    assert peak_flops.peak_flops() is None


def test_peak_of_several_accelerators_is_their_sum(monkeypatch):
    monkeypatch.setattr(peak_flops, "_measure", lambda: 5.0)
    assert peak_flops.peak_flops_of_all(8) == 5  # simulated devices share the cores
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert peak_flops.peak_flops_of_all(8) == 40

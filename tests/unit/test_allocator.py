"""The allocator is tuned once, early, and only where that helps."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from distaff.execution import allocator

SCRIPT = """
import ctypes, logging, sys
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
calls = []
class Library:
    def mallopt(self, name, value):
        calls.append((name, value))
        return 1
{before}
from distaff.execution import allocator
if not {real}:
    ctypes.CDLL = lambda name: Library()
print(allocator.tune(), len(calls))
print(allocator.tune() == allocator.tune(), len(calls))
"""


def run(before: str = "", real: bool = False, **environment: str) -> tuple[list[str], str]:
    inherited = {
        n: v
        for n, v in os.environ.items()
        if not n.startswith(("MALLOC_", "LD_PRELOAD", "DISTAFF"))
    }
    script = SCRIPT.format(before=before, real=real)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env={**inherited, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines(), done.stderr


linux = pytest.mark.skipif("glibc" not in allocator._libc(), reason="glibc only")


@linux
def test_it_is_tuned_once_before_jax_starts():
    out, log = run()
    assert out == ["tuned 4", "True 4"]
    assert log.count("memory allocator: tuned") == 1


@linux
def test_glibc_takes_the_settings():
    assert run(real=True)[0][0].startswith("tuned ")


@linux
def test_too_late_is_noted_once_and_not_warned_of():
    out, log = run("import jax; jax.devices()")
    assert out[0].startswith("not tuned, because JAX had started")
    assert out[0].endswith(" 0")
    assert log.count("INFO memory allocator") == 1
    assert "WARNING" not in log


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"DISTAFF_MALLOC": "off"}, "DISTAFF_MALLOC"),
        ({"MALLOC_ARENA_MAX": "2"}, "the environment"),
        ({"JAX_PLATFORMS": "cuda,cpu"}, "accelerator"),
    ],
)
@linux
def test_it_is_left_alone_where_somebody_else_decides(monkeypatch, environment, reason):
    monkeypatch.delenv("DISTAFF_MALLOC", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if "JAX_PLATFORMS" in environment:
        monkeypatch.setattr(allocator, "on_cpu_alone", lambda: False)
    assert reason in allocator._reason_against()


def test_it_is_left_alone_without_glibc(monkeypatch):
    monkeypatch.delenv("DISTAFF_MALLOC", raising=False)
    monkeypatch.setattr(allocator, "_libc", lambda: "")
    assert "not glibc" in allocator._reason_against()


TRAINER = """
import logging
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
import numpy as np
from distaff.execution import allocator
from distaff import data, tasks, zoo
loader = data.ArrayLoader(
    {{"image": np.zeros((64, 8, 8, 1), np.float32), "label": np.zeros(64, np.int32)}}, 64
)
started = []
tune = allocator._tune
allocator._tune = lambda reason: started.append(allocator.has_started()) or tune(reason)
trainer = tasks.Classifier(zoo.CNN(features={features}), root=None, enable_progress_bar=False)
trainer.train_model(loader, num_epochs=1)
print(started)
"""


@linux
@pytest.mark.parametrize(
    ("features", "outcome"),
    [("(8,)", "INFO memory allocator: not tuned (a forward pass makes"),
     ("(512,)", "INFO memory allocator: tuned")],
)  # fmt: skip
@pytest.mark.slow
def test_trainer_tunes_for_large_steps_alone_before_jax_starts(features, outcome):
    environment = {n: v for n, v in os.environ.items() if n != "DISTAFF_MALLOC"}
    done = subprocess.run(
        [sys.executable, "-c", TRAINER.format(features=features)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[False]"
    assert outcome in done.stderr


def test_made_bytes_counts_what_is_made_inside_as_well():
    def function(x):
        return jax.jit(lambda y: jnp.tanh(y * 2))(x).sum()

    assert allocator.made_bytes(function, jnp.ones((5, 5))) == 2 * 100 + 4


def test_what_cannot_be_told_counts_as_large(monkeypatch):
    asked = []
    monkeypatch.setattr(allocator, "_reason_against", lambda: "")
    monkeypatch.setattr(allocator, "_tune", lambda reason: asked.append(reason) or "")
    allocator.tune(lambda: 1 // 0)
    allocator.tune(lambda: allocator._MIN_BYTES)
    allocator.tune(lambda: allocator._MIN_BYTES - 1)
    assert [bool(reason) for reason in asked] == [False, False, True]


def test_looking_whether_jax_has_started_changes_nothing():
    before = jax.config.jax_num_cpu_devices
    jax.devices()
    assert allocator.has_started()
    assert jax.config.jax_num_cpu_devices == before

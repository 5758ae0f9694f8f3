"""`deterministic=True`: the backend's flag, and the first steps, which run twice."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.errors import ConfigError, ReproducibilityError
from distaff.execution import determinism
from line import Line, trained

FLAG = "--xla_gpu_deterministic_ops=true"


class Inexact(Line):
    """Its loss depends on how often it was computed, from a step on."""

    first_bad = 1

    def __init__(self, **options: Any) -> None:
        self.num_calls = 0
        super().__init__(**options)

    def loss_fn(self, params, batch, ctx):
        def noise(step: Any) -> Any:
            self.num_calls += 1
            return np.float32(self.num_calls * (step >= self.first_bad))

        made = jax.pure_callback(noise, jax.ShapeDtypeStruct((), jnp.float32), ctx.state.step + 1)
        return super().loss_fn(params, batch, ctx) * (1 + made)


def test_numbers_are_those_of_a_run_without_the_option():
    plain = trained(Line, name="plain")
    found = trained(Line, name="exact", deterministic=True, recompile="error")
    np.testing.assert_array_equal(found.params, plain.params)
    assert found.logged == plain.logged


def test_inexact_step_raises_with_the_names_of_its_arrays():
    with pytest.raises(ReproducibilityError) as caught:
        trained(Inexact, root=None, deterministic=True)
    text = str(caught.value)
    assert "training step is not deterministic. Two executions of steps 1 to 2," in text
    assert "params/w (" in text
    assert "metrics/loss" in text
    assert "agrees with neither" in text
    assert "deterministic='warn'" in text


def test_warn_names_them_and_trains(caplog):
    with (
        caplog.at_level(logging.WARNING, "distaff"),
        pytest.warns(UserWarning, match="not deterministic.*params/w"),
    ):
        found = trained(Inexact, root=None, deterministic="warn")
    assert found.result.status == "finished"
    assert "params/w" in caplog.text


def test_only_the_first_steps_of_a_start_are_repeated():
    first = determinism.FirstSteps(True)
    assert [first.must_repeat(range(n, n + 1)) for n in (1, 2, 3)] == [True, False, False]
    later = type("Later", (Inexact,), {"first_bad": 3})
    assert trained(later, root=None, deterministic=True).result.status == "finished"


def test_resumed_run_is_checked_and_has_the_same_bits(tmp_path):
    expected = trained(Line, root=tmp_path / "whole")
    options: dict[str, Any] = {"root": tmp_path / "cut", "deterministic": True}
    trained(Line, max_time=0.001, **options)
    resumed = trained(Line, **options)
    assert 0 < resumed.result.first_step < resumed.result.step
    np.testing.assert_array_equal(resumed.params, expected.params)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"deterministic": "warm"}, "Did you mean 'warn'"),
        ({"deterministic": 1}, "deterministic has no value 1"),
        ({"deterministic": True, "steps_per_call": "measure"}, "contradict"),
    ],
)
def test_bad_options_raise(options, text):
    with pytest.raises(ConfigError, match=text):
        Line(**options)


@pytest.mark.parametrize(
    ("flags", "has_started", "expected"),
    [
        (None, False, FLAG),
        ("--xla_a=1", False, f"--xla_a=1 {FLAG}"),
        ("--xla_gpu_deterministic_ops=false", False, "--xla_gpu_deterministic_ops=false"),
        ("--xla_a=1", True, "--xla_a=1"),
    ],
)
def test_flag_is_set_before_the_backend_starts(flags, has_started, expected, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags or "")
    monkeypatch.setattr(determinism, "has_started", lambda: has_started)
    Line(deterministic=True)
    assert os.environ["XLA_FLAGS"] == (flags or "")  # a CPU needs none
    monkeypatch.setattr(determinism, "on_cpu_alone", lambda: False)
    Line()
    assert os.environ["XLA_FLAGS"] == (flags or "")  # not asked for
    Line(deterministic=True)
    assert os.environ["XLA_FLAGS"] == expected


PROGRAM = """
import os, sys
from distaff.execution import allocator, determinism
determinism.on_cpu_alone = lambda: False
from line import Line, loader, trained
trainer = Line(root=None, example_batch=loader().peek(), deterministic=sys.argv[1] == "True")
trainer.train_model(loader(), num_epochs=2)
print(os.environ.get("XLA_FLAGS"), trainer.state.params["w"].tolist())
"""


@pytest.mark.slow
def test_process_has_the_flag_before_its_first_array_and_the_same_numbers():
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    env = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    env.pop("XLA_FLAGS", None)
    plain, exact = (
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(value)],
            env=env,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split(maxsplit=1)
        for value in (False, True)
    )
    assert [plain[0], exact[0]] == ["None", FLAG]
    assert plain[1] == exact[1]


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (FLAG, ""),
        ("--xla_a=1 --xla_gpu_deterministic_ops", ""),
        ("", "has no such flag, and JAX has already started"),
        ("--xla_gpu_deterministic_ops=false", "turns it off"),
        (f"{FLAG} --xla_gpu_deterministic_ops=0", "turns it off"),
    ],
)
def test_gpu_without_the_flag_raises(flags, error, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    determinism.check_backend()  # a CPU needs none
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    if not error:
        determinism.check_backend()
        return
    with pytest.raises(ConfigError, match=f"{error}.*Set XLA_FLAGS={FLAG} in the environment"):
        determinism.check_backend()


def test_training_checks_the_backend(monkeypatch):
    monkeypatch.setattr("distaff.trainer.training.check_backend", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained(Line, deterministic=True)

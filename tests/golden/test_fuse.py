"""Fused or not, the same: parameters, metrics of each step, log lines, hooks, endings."""

from __future__ import annotations

import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distaff
from distaff import data, metrics
from distaff.errors import NonFiniteError

RNG = np.random.default_rng(3)
X = RNG.normal(size=(50, 6)).astype(np.float32)
Y = (X[:, :2] > 0).astype(np.float32)


class Model(nn.Module):
    """Dropout for keys, BatchNorm for statistics."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x)))
        return nn.Dense(2)(nn.Dropout(0.3, deterministic=not train)(x))


class Trainer(distaff.TrainerModule):
    traces = 0

    def loss_fn(self, params: Any, batch: Any, ctx: distaff.Context) -> Any:
        self.traces += ctx.train
        error = jnp.square(ctx.apply(params, batch["x"]) - batch["y"]).mean(axis=1)
        return error, {"weighted": metrics.Mean.per_example(error, batch["y"][:, 0] + 0.5)}


class Watching(distaff.Callback):
    def __init__(self) -> None:
        self.heard: list[tuple[int, float]] = []

    def on_step_end(self, info: distaff.StepInfo) -> None:
        self.heard.append((info.step, float(info.metrics["loss"].compute())))


def loaders(kind: str) -> tuple[Any, Any]:
    train = data.ArrayLoader({"x": X, "y": Y}, 8, shuffle=True, remainder="keep")
    val = data.ArrayLoader({"x": X[:20], "y": Y[:20]}, 8)
    if kind == "resident":
        return train, val
    return (
        [list(train), list(val)]
        if kind == "list"
        else (data.Stream(lambda: iter(list(train))), list(val))
    )


def trained(steps_per_call: Any, kind: str = "resident", **options: Any) -> tuple[Trainer, Any]:
    trainer = Trainer(
        Model(),
        optimizer=distaff.OptimizerConfig("adamw", learning_rate=1e-2, weight_decay=0.1),
        enable_progress_bar=False,
        steps_per_call=steps_per_call,
        **{"log_every_n_steps": 5, **options},
    )
    train, val = loaders(kind)
    return trainer, trainer.train_model(train, val, num_epochs=4)


def lines(result: Any) -> list[Any]:
    return [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]


def untimed(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "time"}


def same_bits(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(
        jax.random.key_data(a).tobytes() == jax.random.key_data(b).tobytes()
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
        else np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in pairs
    )


@pytest.mark.slow_but("resident-1", "list-3")
@pytest.mark.parametrize(
    ("kind", "log_every"), [("resident", 1), ("resident", 3), ("list", 3), ("list", 100)]
)
def test_fused_steps_are_single_steps_bit_for_bit(kind, log_every):
    single, expected = trained(1, kind, log_every_n_steps=log_every)
    for steps_per_call in (2, 5) if log_every == 3 else (4,):
        fused, result = trained(steps_per_call, kind, log_every_n_steps=log_every)
        assert same_bits(fused.state, single.state)
        assert [untimed(line) for line in lines(result)] == [
            untimed(line) for line in lines(expected)
        ]
        assert result.metrics == expected.metrics
        assert result.step == expected.step == 28


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resident", "list"])
def test_full_chunks_of_an_accelerator_have_a_program_of_their_own(monkeypatch, kind):
    single, expected = trained(1, kind)
    programs = []
    monkeypatch.setattr("distaff.execution.dispatch.steps_per_call._is_accelerated", lambda: True)
    make = distaff.execution.execution.Compiled.program
    monkeypatch.setattr(
        "distaff.execution.execution.Compiled.program",
        lambda *each, **options: programs.append(make(*each, **options)) or programs[-1],
    )
    # An epoch has six batches of 8, five as one program and one more; and one of 2.
    full, result = trained(5, kind)
    assert same_bits(full.state, single.state)
    assert [untimed(line) for line in lines(result)] == [untimed(line) for line in lines(expected)]
    (own,) = [each for each in programs if "<lambda>" in str(each) and each._cache_size()]
    assert own._cache_size() == 1


def test_comparison_would_notice_another_seed():
    assert not same_bits(trained(4, seed=1)[0].state.params, trained(4)[0].state.params)


@pytest.mark.slow
def test_one_program_serves_all_lengths_and_auto_is_the_same():
    single, _ = trained(1)
    for steps_per_call in ("auto", 5):
        fused, _ = trained(steps_per_call)
        assert same_bits(fused.state, single.state)
        # One trace for batches of 8, one for the last ones of 2.
        assert fused.traces == 2


def test_hooks_hear_of_every_step_in_order():
    heard = {}
    for steps_per_call in (1, 3):
        watching = Watching()
        trained(steps_per_call, callbacks=[watching])
        heard[steps_per_call] = watching.heard
    assert heard[1] == heard[3]
    assert [step for step, _ in heard[1]] == list(range(1, 29))


def test_state_is_told_after_the_last_step_of_a_program_only():
    class States(distaff.Callback):
        def __init__(self) -> None:
            self.told: list[int] = []

        def on_step_end(self, info: distaff.StepInfo) -> None:
            if info.state is not None:
                assert int(info.state.step) == info.step
                self.told.append(info.step)

    states = States()
    trained(3, callbacks=[states])
    assert states.told[:4] == [3, 6, 7, 10]


def test_run_that_is_watched_stops_after_the_step_that_stops_it():
    class Stopper(distaff.Callback):
        def on_step_end(self, info: distaff.StepInfo) -> None:
            if info.step == 9:
                raise distaff.StopTraining("enough")

    assert trained("auto", callbacks=[Stopper()])[1].step == 9


@pytest.mark.slow_but("4")
@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_bad_step_is_named(steps_per_call):
    bad = X.copy()
    bad[20] = np.nan
    trainer = Trainer(Model(), enable_progress_bar=False, steps_per_call=steps_per_call)
    with pytest.raises(NonFiniteError, match=r"at step 3\. It was batch 3 of epoch 1"):
        trainer.train_model(data.ArrayLoader({"x": bad, "y": Y}, 8), num_epochs=1)


def test_choice_is_kept_with_the_run():
    _, result = trained("auto")
    assert "per call" in (result.path / "log.txt").read_text()

"""Measured forms: tried on a copy before the first step, kept with the run and on the machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import distaff
from distaff import data, tasks, zoo
from distaff.execution import compile_cache
from distaff.execution.dispatch import calibration
from distaff.execution.dispatch.calibration import fused_first, single_first
from distaff.execution.dispatch.steps_per_call import Timing
from distaff.execution.feed.chunk import SINGLE, ChunkSize


def tried(trying: Any, single: Any, fused: Any) -> tuple[list[ChunkSize], ChunkSize, Timing]:
    """Runs what is asked for until the choice is made.

    Args:
        trying: makes the choice.
        single: seconds of each single step, or those of one after the other.
        fused: likewise of each fused step.
    """
    times = {True: _times(single), False: _times(fused)}
    asked = [next(trying)]
    try:
        while True:
            asked.append(trying.send(next(times[asked[-1] == SINGLE])))
    except StopIteration as end:
        return (asked, *end.value)


def _times(seconds: Any) -> Iterator[float]:
    return repeat(seconds) if isinstance(seconds, float) else iter(seconds)


def test_fast_fused_steps_are_kept_without_a_comparison():
    asked, form, timing = tried(fused_first(64), single=1.0, fused=1e-4)
    assert SINGLE not in asked
    assert asked[0] == ChunkSize(1, 64)
    assert (form, timing) == (ChunkSize(64, 64), Timing(None, 1e-4))


@pytest.mark.parametrize("trying", [fused_first, single_first])
@pytest.mark.parametrize(("single", "kept"), [(3e-3, ChunkSize(10, 64)), (1e-3, SINGLE)])
def test_slower_steps_are_compared(trying, single, kept):
    asked, form, _ = tried(trying(64), single=single, fused=2e-3)
    assert SINGLE in asked
    assert form == kept


def test_slow_single_steps_are_kept_without_compiling_another_program():
    asked, form, timing = tried(single_first(64), single=0.1, fused=1e-6)
    assert set(asked) == {SINGLE}
    assert (form, timing) == (SINGLE, Timing(0.1, None))


@pytest.mark.parametrize(("trying", "number"), [(single_first, 1), (fused_first, 2)])
def test_form_that_clearly_loses_is_given_up(trying, number):
    asked, form, _ = tried(trying(64), single=1e-3, fused=25e-3)
    assert [each for each in asked if each != SINGLE] == [ChunkSize(1, 64)] * number
    assert form == SINGLE


@pytest.mark.parametrize("factors", [(1.0, 6.0, 1.0), (6.0, 1.0, 6.0), (1.0, 1.0, 6.0, 6.0)])
def test_slow_moments_of_the_machine_do_not_make_the_choice(factors):
    noisy = chain((factor * 1e-3 for factor in factors), repeat(1e-3))
    assert tried(fused_first(64), single=1.4e-3, fused=noisy)[1] == ChunkSize(20, 64)


def test_call_takes_about_as_long_as_an_answer_may():
    assert tried(fused_first(256), single=1.0, fused=1e-2)[1] == ChunkSize(2, 256)


def batches(size: int = 8) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [
        {
            "image": random.normal(size=(size, 4, 4, 1)).astype(np.float32),
            "label": random.integers(10, size=size).astype(np.int32),
        }
        for _ in range(40)
    ]


def trained(
    loader: Any = None, *, steps_per_call: Any = "measure", **options: Any
) -> tuple[Any, dict[str, Any], Path]:
    """Trains, and returns the trainer, what the status says of the form, and the directory."""
    trainer = tasks.Classifier(
        zoo.MLP((5, 10)),
        optimizer=distaff.OptimizerConfig("adam"),
        enable_progress_bar=False,
        recompile="error",
        steps_per_call=steps_per_call,
        **options,
    )
    result = trainer.train_model(batches() if loader is None else loader, num_epochs=1)
    facts = json.loads((result.path / "status.json").read_text())["steps_per_call"]
    return trainer, facts, result.path


def same_params(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one.state.params), jax.tree.leaves(other.state.params), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@pytest.mark.slow
def test_measured_form_is_kept_with_the_run_and_remembered_on_the_machine():
    first, measured, path = trained()
    assert measured["why"] == "measured"
    assert measured["seconds_per_step"]["fused"] > 0
    assert json.loads((path / "steps_per_call.json").read_text()) == measured
    assert "measured (" in (path / "log.txt").read_text()
    file = compile_cache.home() / "forms.json"
    assert file.stat().st_mode & 0o777 == 0o600
    second, remembered, path = trained()
    assert remembered == {**measured, "why": "remembered"}
    assert json.loads((path / "steps_per_call.json").read_text()) == remembered
    file.write_text(file.read_text()[:40])
    assert trained()[1]["why"] == "measured"
    # The rehearsal has moved neither the state nor the loader.
    fixed, _, _ = trained(steps_per_call=measured["num_steps"], tune_process=False)
    assert same_params(first, fixed)
    assert same_params(second, fixed)


def test_run_that_was_killed_before_its_first_checkpoint_keeps_its_form(monkeypatch):
    class Killed(distaff.Callback):
        def on_epoch_end(self, info: distaff.StepInfo) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(callbacks=[Killed()], name="run", tune_process=False)
    (file,) = Path("runs/run").rglob("steps_per_call.json")
    kept = json.loads(file.read_text())
    monkeypatch.setattr(calibration, "_measure", None)
    _, facts, path = trained(name="run", tune_process=False)
    assert (path, facts) == (file.parent.resolve(), kept)


def test_loader_of_arrays_and_a_placed_batch_are_measured_in_their_own_form():
    arrays = jax.tree.map(lambda *each: np.concatenate(each), *batches())
    loader = data.ArrayLoader(arrays, 8, shuffle=True)
    assert trained(loader, tune_process=False)[1]["why"] == "measured"
    placed = [jax.device_put(batch, jax.devices()[1]) for batch in batches()[:4]]
    assert trained(placed, tune_process=False)[1]["why"] == "measured"


@pytest.mark.slow
def test_nothing_is_written_where_nothing_is_measured():
    for steps_per_call in ("auto", 2):
        _, _, path = trained(steps_per_call=steps_per_call)
        assert not (path / "steps_per_call.json").exists()
    assert not (compile_cache.home() / "forms.json").exists()

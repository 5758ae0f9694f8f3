"""The choice between single and fused steps, from times that a test makes up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.data import SINGLE, Chunk, Form, One, Stacked
from distaff.execution import Compiled
from distaff.forms import Expected, Fixed, Measured, Remembered, Timing, convolves, make_forms
from distaff.fuse import Steps
from distaff.metrics import Mean


def choose(forms: Any, single: Any, fused: Any) -> list[Form]:
    """Runs what is asked for until the choice is made, and returns all of it.

    Args:
        forms: makes the choice.
        single: seconds of each single step, or those of one after the other.
        fused: likewise of each fused step.
    """
    times = {1: _times(single), **{capacity: _times(fused) for capacity in (7, 64, 256)}}
    tried, compiled = [], set()
    while forms.measuring:
        assert forms.capacity == 1
        form = forms.form
        tried.append(form)
        forms.took(next(times[form.capacity]) if form.capacity in compiled else None)
        compiled.add(form.capacity)
    return tried


def _times(seconds: Any) -> Iterator[float]:
    return repeat(seconds) if isinstance(seconds, float) else iter(seconds)


def test_fast_fused_steps_are_kept_without_a_comparison():
    forms = Measured(64, single_first=False)
    tried = choose(forms, single=1.0, fused=1e-4)
    assert SINGLE not in tried
    assert tried[:2] == [Form(1, 64), Form(1, 64)]  # the first call compiles
    assert forms.form == Form(64, 64)
    assert forms.capacity == 64
    assert forms.describe() == "64 per call (0.1 ms fused)"
    assert forms.facts() == {
        "num_steps": 64,
        "capacity": 64,
        "why": "measured",
        "seconds_per_step": {"single": None, "fused": 1e-4},
    }


@pytest.mark.parametrize("single_first", [False, True])
@pytest.mark.parametrize(("single", "kept"), [(3e-3, Form(10, 64)), (1e-3, SINGLE)])
def test_slower_steps_are_compared(single, kept, single_first):
    forms = Measured(64, single_first=single_first)
    assert SINGLE in choose(forms, single=single, fused=2e-3)
    assert forms.form == kept
    assert "one by one" in forms.describe()


def test_slow_single_steps_are_kept_without_compiling_another_program():
    forms = Measured(64, single_first=True)
    assert set(choose(forms, single=0.1, fused=1e-6)) == {SINGLE}
    assert forms.form == SINGLE
    assert forms.describe() == "1 per call (100 ms one by one)"


@pytest.mark.parametrize(("single_first", "num_steps"), [(True, 2), (False, 3)])
def test_form_that_clearly_loses_is_given_up_after_two_or_three_steps(single_first, num_steps):
    forms = Measured(64, single_first=single_first)
    tried = choose(forms, single=1e-3, fused=25e-3)
    assert [form for form in tried if form != SINGLE] == [Form(1, 64)] * num_steps
    assert forms.form == SINGLE


def test_form_that_clearly_wins_is_not_compared_again():
    forms = Measured(64, single_first=True)
    tried = choose(forms, single=4e-3, fused=1e-3)
    assert [form for form in tried if form != SINGLE] == [Form(1, 64)] * 2 + [Form(20, 64)] * 2
    assert forms.form == Form(20, 64)


def test_comparison_fits_into_a_short_run():
    forms = Measured(7, single_first=False)
    tried = choose(forms, single=3e-3, fused=2e-3)
    assert sum(form.num_steps for form in tried) <= 32
    assert forms.form == Form(7, 7)


def noisy(*factors: float, seconds: float) -> Iterator[float]:
    """Yields times of a machine that is busy with something else at first, then is not."""
    return chain((factor * seconds for factor in factors), repeat(seconds))


@pytest.mark.parametrize("factors", [(1.0, 6.0, 1.0), (6.0, 1.0, 6.0), (1.0, 1.0, 6.0, 6.0)])
def test_slow_moments_of_the_machine_do_not_make_the_choice(factors):
    forms = Measured(64, single_first=False)
    choose(forms, single=1.4e-3, fused=noisy(*factors, seconds=1e-3))
    assert forms.form == Form(20, 64)


@pytest.mark.parametrize("accelerated", [True, False])
@pytest.mark.parametrize("fused", [5e-4, 2e-3])
@pytest.mark.parametrize("is_long", [True, False])
def test_short_steps_of_a_long_run_have_programs_of_fixed_length(
    monkeypatch, accelerated, fused, is_long
):
    monkeypatch.setattr("distaff.forms._is_accelerated", lambda: accelerated)
    forms = Measured(64, single_first=False, is_long=is_long)
    tried = choose(forms, single=1.0, fused=fused)
    assert not any(form.rest for form in tried)
    num_steps = round(0.02 / fused)
    pays = accelerated and is_long and fused < 1e-3
    kept = Form(num_steps, num_steps, 64) if pays else Form(num_steps, 64)
    assert forms.form == kept
    assert forms.facts()["capacity"] == 64
    timing = Timing(None, fused)
    assert Remembered(Form(num_steps, 64), timing, is_long=is_long).form == kept
    assert Fixed(64).form == Form(64, 64, 64 * accelerated)


def test_calls_that_say_nothing_are_made_again_but_not_for_ever():
    forms = Measured(64, single_first=False)
    for _ in range(15):
        forms.took(None)
    assert forms.form == Form(1, 64)
    forms.took(1e-4)
    for _ in range(16):
        assert forms.measuring
        forms.took(None)
    assert (forms.measuring, forms.form) == (False, SINGLE)


def test_call_takes_about_as_long_as_an_answer_may():
    forms = Measured(256, single_first=False)
    choose(forms, single=1.0, fused=1e-2)
    assert forms.form == Form(2, 256)


def test_forms_say_nothing_before_the_choice_and_where_there_was_none():
    assert Measured(8, single_first=True).describe() == ""
    assert Measured(8, single_first=True).facts()["why"] == "measuring"
    assert Fixed(4).describe() == ""
    assert (Fixed(4).form, Fixed(4).capacity) == (Form(4, 4), 4)
    assert Fixed(4).facts()["why"] == "given"


METRICS = {"loss": jax.ShapeDtypeStruct((2,), jnp.float32)}


def traced(factor: float = 2.0, size: int = 3) -> Callable[[], Any]:
    return lambda: jax.make_jaxpr(lambda x: factor * x)(jnp.ones(size))


def forms_of(
    steps_per_call=None, metrics=METRICS, watched=False, steps_per_epoch=40, **options: Any
) -> Any:
    return make_forms(
        steps_per_call or "auto",
        metrics,
        Expected(steps_per_epoch),
        watched=watched,
        **{"jaxpr": traced(), **options},
    )


def test_make_forms_keeps_programs_within_an_epoch_and_within_memory():
    assert forms_of().form == Form(1, 40)
    assert forms_of(steps_per_epoch=None).form == Form(1, 256)
    large = {"m": jax.ShapeDtypeStruct((2**20,), jnp.float32)}
    assert forms_of(metrics=large).form == Form(1, 4)


def test_make_forms_runs_one_by_one_where_there_is_no_choice():
    huge = {"m": jax.ShapeDtypeStruct((2**22,), jnp.float32)}
    for options in ({"watched": True}, {"steps_per_epoch": 1}, {"metrics": huge}):
        assert forms_of(**options).form == SINGLE
    assert forms_of(watched=True).facts()["why"] == "watched"


def test_number_that_was_asked_for_is_taken():
    assert forms_of(7).form == Form(7, 7)
    assert forms_of(7, watched=True).form == Form(7, 7)


@pytest.mark.parametrize("single", [3e-3, 1e-3])
def test_choice_is_remembered_for_the_same_step(tmp_path, single):
    file = tmp_path / "forms.json"
    options = {"steps_per_epoch": 64, "file": file}
    first = forms_of(**options)
    choose(first, single=single, fused=2e-3)
    second = forms_of(**options)
    assert isinstance(second, Remembered)
    assert (second.form, second.capacity, second.measuring) == (first.form, first.capacity, False)
    assert second.facts() == {**first.facts(), "why": "remembered"}
    assert second.describe() == first.describe().replace(" per call ", " per call, remembered ")
    for other in ({"jaxpr": traced(3.0)}, {"jaxpr": traced(size=4)}, {"steps_per_epoch": 63}):
        assert forms_of(**{**options, **other}).measuring
    assert forms_of(**{**options, "file": None}).measuring
    assert not forms_of(7, **options).measuring


@pytest.mark.parametrize(
    "change",
    [
        *({"num_steps": steps} for steps in (0, -1, 65, 2.0, True, "2", None, 10**30)),
        *({"seconds_per_step": seconds} for seconds in (None, 3, {}, {"single": 1.0})),
        *({"seconds_per_step": {"single": s, "fused": 1.0}} for s in ("1", -1.0, float("nan"))),
    ],
)
def test_choice_that_cannot_have_been_made_is_ignored(tmp_path: Path, change, monkeypatch):
    written = {"num_steps": 2, "capacity": 64}
    written["seconds_per_step"] = {"single": None, "fused": 1.0}
    options = {"steps_per_epoch": 64, "file": tmp_path / "forms.json"}
    for value, is_remembered in ((written, True), ({**written, **change}, False), ([], False)):
        monkeypatch.setattr("distaff.choices.Entry.read", lambda self, value=value: value)
        assert isinstance(forms_of(**options), Remembered) == is_remembered


class Told(Fixed):
    """Measures for ever, one step at a time, and keeps what it was told."""

    measuring = True

    def __init__(self) -> None:
        super().__init__(1)
        self.told: list[float | None] = []

    def took(self, seconds: float | None) -> None:
        self.told.append(seconds)


def test_steps_time_neither_calls_that_compile_nor_batches_of_another_size():
    metrics = {"loss": Mean(jnp.float32(0), jnp.float32(0))}

    def step(state: Any, batch: Any) -> Any:
        return state + batch.sum(), metrics

    forms, state = Told(), jnp.float32(0)
    steps = Steps(Compiled(), step, metrics, forms=forms, log_every=5)
    for number, size in enumerate((3, 3, 2, 2, 3)):
        chunk = Chunk(1, size, One(np.ones(size, np.float32)))
        state = steps(state, steps.blank, chunk, number)[0]
    # Of the first two sizes the first call compiles.
    assert [seconds is None for seconds in forms.told] == [True, False, True, True, False]
    stacked = Chunk(1, 3, Stacked(np.ones((2, 3), np.float32)))
    for number in range(5, 7):
        state = steps(state, steps.blank, stacked, number)[0]
    assert forms.told[-1] is None  # not the form that was asked for


def test_convolves_looks_into_inner_programs():
    def convolution(x):
        return jax.lax.conv_general_dilated(x, x[:, :, :1, :1], (1, 1), "SAME")

    def found(function: Callable[..., Any]) -> bool:
        return convolves(jax.make_jaxpr(function)(jnp.ones([1, 1, 4, 4])).jaxpr)

    assert found(convolution)
    assert found(jax.jit(jax.grad(lambda x: jax.jit(convolution)(x).sum())))
    assert found(lambda x: jax.lax.fori_loop(0, 2, lambda _, y: convolution(y), x))
    assert not found(jax.jit(lambda x: x @ x))

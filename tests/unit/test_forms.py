"""The choice between single and fused steps, from times that a test makes up."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from distaff.data import SINGLE, Form
from distaff.forms import Fixed, Measured, convolves, make_forms

COMPILING = 9.0


def choose(forms: Measured, single: float, fused: float) -> list[Form]:
    """Runs what is asked for until the choice is made, and returns all of it."""
    tried, compiled = [], set()
    while forms.measuring:
        assert forms.capacity == 1
        form = forms.form
        tried.append(form)
        seconds = single if form == SINGLE else fused
        forms.took(seconds if form.capacity in compiled else COMPILING)
        compiled.add(form.capacity)
    return tried


def test_fast_fused_steps_are_kept_without_a_comparison():
    forms = Measured(64, single_first=False)
    tried = choose(forms, single=1.0, fused=1e-4)
    assert SINGLE not in tried
    assert tried[0] == Form(1, 64)
    assert forms.form == Form(64, 64)
    assert forms.capacity == 64
    assert forms.describe() == "64 per call (0.1 ms fused)"


@pytest.mark.parametrize(("single", "kept"), [(3e-3, Form(10, 64)), (1e-3, SINGLE)])
def test_slower_steps_are_compared(single, kept):
    forms = Measured(64, single_first=False)
    assert SINGLE in choose(forms, single=single, fused=2e-3)
    assert forms.form == kept
    assert "one by one" in forms.describe()


def test_slow_single_steps_are_kept_without_compiling_another_program():
    forms = Measured(64, single_first=True)
    assert set(choose(forms, single=0.1, fused=1e-6)) == {SINGLE}
    assert forms.form == SINGLE
    assert forms.describe() == "1 per call (100 ms one by one)"


def test_form_that_clearly_loses_is_given_up_after_two_steps():
    forms = Measured(64, single_first=True)
    tried = choose(forms, single=1e-3, fused=25e-3)
    fused = [form for form in tried if form != SINGLE]
    assert fused == [Form(1, 64), Form(2, 64)]
    assert forms.form == SINGLE


def test_call_takes_about_as_long_as_an_answer_may():
    forms = Measured(256, single_first=False)
    choose(forms, single=1.0, fused=1e-2)
    assert forms.form == Form(2, 256)


def test_forms_say_nothing_before_the_choice_and_where_there_was_none():
    assert Measured(8, single_first=True).describe() == ""
    assert Fixed(4).describe() == ""
    assert (Fixed(4).form, Fixed(4).capacity) == (Form(4, 4), 4)


METRICS = {"loss": jax.ShapeDtypeStruct((2,), jnp.float32)}


def form_of(steps_per_call=None, metrics=METRICS, steps_per_epoch=40, watched=False) -> Form:
    return make_forms(
        steps_per_call or "auto",
        metrics,
        steps_per_epoch=steps_per_epoch,
        watched=watched,
        convolves=lambda: False,
    ).form


def test_make_forms_keeps_programs_within_an_epoch_and_within_memory():
    assert form_of() == Form(1, 40)
    assert form_of(steps_per_epoch=None) == Form(1, 256)
    assert form_of(metrics={"m": jax.ShapeDtypeStruct((2**20,), jnp.float32)}) == Form(1, 4)


def test_make_forms_runs_one_by_one_where_there_is_no_choice():
    assert form_of(watched=True) == SINGLE
    assert form_of(steps_per_epoch=1) == SINGLE
    assert form_of(metrics={"m": jax.ShapeDtypeStruct((2**22,), jnp.float32)}) == SINGLE


def test_number_that_was_asked_for_is_taken():
    assert form_of(7) == Form(7, 7)
    assert form_of(7, watched=True) == Form(7, 7)


def test_convolves_looks_into_inner_programs():
    def convolution(x):
        return jax.lax.conv_general_dilated(x, x[:, :, :1, :1], (1, 1), "SAME")

    picture = jnp.ones([1, 1, 4, 4])
    assert convolves(convolution, picture)
    assert convolves(jax.jit(jax.grad(lambda x: jax.jit(convolution)(x).sum())), picture)
    assert convolves(lambda x: jax.lax.fori_loop(0, 2, lambda _, y: convolution(y), x), picture)
    assert not convolves(jax.jit(lambda x: x @ x), picture)

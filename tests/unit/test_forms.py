"""The choice between single and fused steps: a function of the step's program, not of a clock."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from distaff import TrainerConfig
from distaff.errors import ConfigError
from distaff.execution.dispatch.steps_per_call import (
    Expected,
    FusionChoice,
    Timing,
    choose_fusion,
    continued,
    fixed,
    recorded,
    with_full_program,
)
from distaff.execution.feed.chunk import SINGLE, ChunkSize

METRICS = {"loss": jax.ShapeDtypeStruct((2,), jnp.float32)}


def traced(size: int = 3) -> Callable[[], Any]:
    return lambda: jax.make_jaxpr(lambda x: x @ x)(jax.ShapeDtypeStruct((size, size), jnp.float32))


def convolution() -> Any:
    x = jnp.ones([1, 1, 8, 8])
    return jax.make_jaxpr(lambda x: jax.lax.conv_general_dilated(x, x, (1, 1), "SAME"))(x)


def choose(
    steps_per_call: Any = "auto",
    *,
    metrics: Any = METRICS,
    watched: bool = False,
    jaxpr: Callable[[], Any] = traced(),  # noqa: B008 - makes a function
    **expected: Any,
) -> FusionChoice:
    return choose_fusion(
        steps_per_call, metrics, Expected(**expected), watched=watched, jaxpr=jaxpr
    )


def test_small_steps_are_fused_within_an_epoch_and_within_memory():
    assert choose().chunk_size == ChunkSize(256, 256)
    assert choose(steps_per_epoch=40).chunk_size == ChunkSize(40, 40)
    large = {"m": jax.ShapeDtypeStruct((2**20,), jnp.float32)}
    assert choose(metrics=large).chunk_size == ChunkSize(4, 4)
    assert choose().why == "estimated"


def test_larger_steps_are_fewer_and_the_largest_run_one_at_a_time_in_the_loop():
    numbers = [choose(jaxpr=traced(size)).chunk_size.num_steps for size in (64, 512, 1024, 4096)]
    assert numbers == sorted(numbers, reverse=True)
    assert 1 < numbers[1] < 256
    assert choose(jaxpr=traced(4096)).chunk_size == ChunkSize(1, 2)


def test_convolutions_are_fused_on_accelerators_only(monkeypatch):
    assert choose(jaxpr=convolution).chunk_size == SINGLE
    monkeypatch.setattr("distaff.execution.dispatch.steps_per_call._is_accelerated", lambda: True)
    assert choose(jaxpr=convolution).chunk_size.num_steps > 1


@pytest.mark.parametrize("steps_per_call", ["auto", "measure"])
def test_steps_run_one_by_one_where_there_is_no_choice(steps_per_call):
    huge = {"m": jax.ShapeDtypeStruct((2**22,), jnp.float32)}
    for options, why in (
        ({"watched": True}, "callback"),
        ({"num_shapes": 2}, "shapes"),
        ({"steps_per_epoch": 1}, "epoch"),
        ({"metrics": huge}, "metrics"),
    ):
        choice = choose(steps_per_call, **options)
        assert choice.chunk_size == SINGLE
        assert choice.measurement is None
        assert why in choice.why


@pytest.mark.parametrize("accelerated", [True, False])
@pytest.mark.parametrize("seconds", [5e-4, 2e-3])
@pytest.mark.parametrize("is_long", [True, False])
def test_short_steps_of_a_long_run_have_programs_of_fixed_length(
    monkeypatch, accelerated, seconds, is_long
):
    monkeypatch.setattr(
        "distaff.execution.dispatch.steps_per_call._is_accelerated", lambda: accelerated
    )
    pays = accelerated and is_long and seconds < 1e-3
    kept = ChunkSize(20, 20, 64) if pays else ChunkSize(20, 64)
    assert with_full_program(ChunkSize(20, 64), seconds, is_long=is_long) == kept
    form = choose(total_steps=20_000 if is_long else 19_999).chunk_size
    assert form == ChunkSize(256, 256, 256 * (accelerated and is_long))
    assert fixed(64).chunk_size == ChunkSize(64, 64, 64 * accelerated)


def test_number_that_was_asked_for_is_taken():
    assert choose(7).chunk_size == ChunkSize(7, 7)
    assert choose(7, watched=True).chunk_size == ChunkSize(7, 7)
    assert choose(7).describe() == "step fusion: 7 steps per call, given"


def test_choice_is_described_in_a_few_words():
    assert choose(jaxpr=convolution).describe() == "step fusion: off, estimated"
    measured = FusionChoice(ChunkSize(4, 64), "measured", Timing(3e-3, 2e-3))
    assert measured.describe() == (
        "step fusion: 4 steps per call, measured (3 ms unfused, 2 ms fused per step)"
    )


def test_resumed_run_keeps_its_choice_whatever_would_be_chosen_now():
    before = FusionChoice(ChunkSize(20, 64, 64), "measured", Timing(None, 1e-3))
    facts = json.loads(json.dumps(before.facts()))
    assert recorded(facts) == before
    for now in (choose(), choose("measure")):
        assert continued(now, facts) == before
    for now in (choose(7), choose(watched=True)):
        assert continued(now, facts) == now
    for own in (fixed(7), choose(watched=True)):
        assert continued(choose(), own.facts()) == choose()
    with pytest.raises(ValueError, match="steps_per_call is 7"):
        continued(choose(), 7)


@pytest.mark.parametrize(
    "change",
    [
        *({"num_steps": steps} for steps in (0, -1, 65, 2.0, True, "2", None, 10**30)),
        *({"capacity": capacity} for capacity in (0, 257, None)),
        *({"rest": rest} for rest in (-1, 1.0, 257)),
        *({"seconds_per_step": seconds} for seconds in (None, 3)),
        *({"seconds_per_step": {"single": s, "fused": 1.0}} for s in ("1", -1.0, float("nan"))),
        *({"why": why} for why in ("given", "because", None, [])),
    ],
)
def test_choice_that_cannot_have_been_made_is_ignored(change):
    facts = FusionChoice(ChunkSize(2, 64), "estimated", Timing(None, 1.0)).facts()
    assert recorded(facts) is not None
    assert recorded({**facts, **change}) is None
    assert recorded([facts]) is None


def test_unknown_word_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"no value 'measured'.*measure"):
        TrainerConfig(steps_per_call="measured")

"""Steps that are repeated, and faults of the hardware that this finds."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import line
from distaff.callbacks import Callbacks, Verify
from distaff.errors import ConfigError, ReproducibilityError
from distaff.execution.dispatch import repetition
from distaff.execution.dispatch.repetition import (
    BitDifference,
    LeafDifference,
    RepeatsSteps,
    differences,
)
from line import Line, loader, trained

STEPS = line.NUM_STEPS


class Faulty(Line):
    """Flips a bit of a weight in chosen executions of chosen steps: pairs of (step, execution)."""

    flips: tuple[tuple[int, int], ...] = ()

    def __init__(self, **options: Any) -> None:
        self.executed: Counter[int] = Counter()
        super().__init__(**options)

    def create_functions(self):
        train_step, eval_step = super().create_functions()

        def fault(step: Any) -> Any:
            self.executed[int(step)] += 1
            place = (int(step), self.executed[int(step)])
            return np.uint32(self.flips.count(place) and 1 << 20 + self.flips.index(place))

        def step(state: Any, batch: Any) -> Any:
            state, metrics = train_step(state, batch)
            flip = jax.pure_callback(fault, jax.ShapeDtypeStruct((), jnp.uint32), state.step)
            bits = jax.lax.bitcast_convert_type(state.params["w"], jnp.uint32)
            bits = bits.at[1].set(bits[1] ^ flip)
            w = jax.lax.bitcast_convert_type(bits, jnp.float32)
            return state.replace(params={"w": w}), metrics

        return step, eval_step


def faulty(*flips: tuple[int, int]) -> type[Faulty]:
    return type("Faulty", (Faulty,), {"flips": flips})


@pytest.mark.parametrize("steps_per_call", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_numbers_are_those_of_a_run_without(steps_per_call):
    options: dict[str, Any] = {"steps_per_call": steps_per_call, "optimizer": optax.adam(0.05)}
    verify = Verify("3 steps")
    plain = trained(Line, **options)
    verified = trained(Line, name="v", recompile="error", callbacks=[verify], **options)
    np.testing.assert_array_equal(verified.params, plain.params)
    assert verified.logged == plain.logged
    assert (verify.num_repeated, verify.num_different) == (2, 0)
    trained(Line, root=None, callbacks=[verify])
    assert verify.num_repeated == 2  # of this run


def test_fault_ends_the_run_with_the_state_before_and_a_resume_continues_it(tmp_path):
    expected = trained(faulty(), root=tmp_path / "good")
    options: dict[str, Any] = {"root": tmp_path / "bad", "callbacks": [Verify(2)]}
    cls = faulty((6, 2))
    trainer = cls(**options, save_every="2 steps")
    with pytest.raises(ReproducibilityError) as caught:
        trainer.train_model(loader(), loader(), loader(), num_epochs=line.NUM_EPOCHS)
    text = str(caught.value)
    assert "steps 5 to 6" in text
    assert "params/w (1 of 3 values, at most" in text
    assert "agrees with the first. The hardware may be faulty" in text
    assert trainer.executed[6] == 3  # a third one decides
    assert trainer.step == int(trainer.state.step) == 4
    saved = trainer._workspace.recording.store.steps()
    assert max(saved) == 4
    cls.flips = ()  # another machine
    resumed = trained(cls, **options, save_every="2 steps")
    assert resumed.result.first_step == 4
    np.testing.assert_array_equal(resumed.params, expected.params)
    assert resumed.logged == expected.logged


@pytest.mark.parametrize("execution", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_warn_continues_with_what_two_of_three_executions_agree_on(execution, caplog):
    expected, verify = trained(faulty(), root=None), Verify("2 steps", on_difference="warn")
    named = "first" if execution == 2 else "second"
    with (
        caplog.at_level(logging.INFO, "distaff"),
        pytest.warns(UserWarning, match=f"steps 3 to 4.*agrees with the {named}"),
    ):
        found = trained(faulty((4, execution)), root=None, callbacks=[verify])
    np.testing.assert_array_equal(found.params, expected.params)
    assert found.result.metrics == expected.result.metrics
    assert (verify.num_repeated, verify.num_different) == (4, 1)
    assert "repeated 4 programs of steps, 1 of them" in caplog.text


@pytest.mark.slow
def test_state_on_a_mesh_and_steps_as_plain_python_are_repeated():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    batches = [jax.device_put(batch, rows) for batch in loader()]
    for options in ({"recompile": "error", "deterministic": True}, {"debug": True}):
        verify = Verify(1)
        trainer = Line(root=None, callbacks=[verify], **options)
        trainer.train_model(batches, num_epochs=1)
        assert verify.num_repeated > 0
        plain = Line(root=None)
        plain.train_model(batches, num_epochs=1)
        np.testing.assert_allclose(trainer.state.params["w"], plain.state.params["w"], rtol=1e-6)


def test_steps_that_are_only_timed_are_not_repeated():
    class Noting(Verify):
        def must_repeat(self, steps):
            noted.append(steps)
            return super().must_repeat(steps)

    noted: list[range] = []
    trained(Line, root=None, steps_per_call="measure", callbacks=[Noting(1)])
    assert [step for steps in noted for step in steps] == list(range(1, STEPS + 1))


def test_three_results_are_not_blamed_on_the_hardware():
    cls = faulty((2, 1), (2, 2), (2, 3))
    with pytest.raises(ReproducibilityError, match=r"with neither.*deterministic=True"):
        trained(cls, root=None, callbacks=[Verify("2 steps")])


@pytest.mark.parametrize(
    ("every", "first", "last", "is_due"),
    [
        ("4 steps", 1, 3, False),
        ("4 steps", 1, 4, True),
        ("4 steps", 4, 4, True),
        ("4 steps", 5, 7, False),
        ("4 steps", 3, 9, True),
        (1, 5, 5, True),
    ],
)
def test_program_with_a_multiple_of_the_steps_is_repeated(every, first, last, is_due):
    assert Verify(every).must_repeat(range(first, last + 1)) is is_due


def test_duration_counts_from_the_last_repetition():
    now = [100.0]
    verify = Verify("10s", clock=lambda: now[0])
    due = []
    for seconds in (9.0, 2.0, 8.0, 2.0, 30.0, 1.0):
        now[0] += seconds
        due.append(verify.must_repeat(range(1, 2)))
    assert due == [False, True, False, True, True, False]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"every": "1 epoch"}, "every must be a positive cadence.*Epochs differ in length"),
        ({"every": 0}, "every must be a positive cadence.*got 0"),
        ({"on_difference": "warning"}, "Did you mean 'warn'"),
    ],
)
def test_bad_arguments_raise(arguments, text):
    with pytest.raises(ConfigError, match=text):
        Verify(**arguments)


def test_only_verify_asks_for_repetitions():
    verify = Verify()
    assert isinstance(verify, RepeatsSteps)
    assert verify.every == "1000 steps"
    assert Callbacks([verify]).step_checks == [verify]
    assert not Callbacks([verify]).watches_steps
    assert Line(root=None).callbacks.step_checks == []


VALUES = [
    *(np.float32([1, np.nan, -0.0]), np.float16([1, 2]), jnp.bfloat16([1, 2])),
    *(np.int32([1, 2]), np.array([True, False]), np.complex64([1, 1j]), np.uint8([3, 4])),
    *(jnp.ones(3, jnp.float8_e4m3fn), jnp.ones(3, jnp.int4), np.float32(2)),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda x: f"{x.dtype}{np.shape(x)}")
def test_one_other_bit_is_found_on_device_and_host(value):
    value = np.asarray(value)
    raw = bytearray(value.tobytes())
    raw[-1] ^= 1
    other = np.frombuffer(bytes(raw), value.dtype).reshape(value.shape)
    assert not repetition._differ([jnp.asarray(value)], [jnp.asarray(value)])
    assert repetition._differ([jnp.asarray(value)], [jnp.asarray(other)])
    assert not differences({"a": value}, {"a": value.copy()})
    (found,) = differences({"a": {"b": value}}, {"a": {"b": other}}).items()
    assert found[0] == "a/b"
    assert found[1].number == 1
    assert found[1].size == value.size


def test_keys_are_compared_by_their_bits():
    keys = [jax.random.key(0), jax.random.key(1)]
    assert repetition._differ(keys[:1], keys[1:])
    assert not repetition._differ(keys[:1], keys[:1])


def test_difference_names_a_few_arrays_and_counts_the_rest():
    leaves = {f"w{n}": LeafDifference(2, 8, 0.5) for n in range(6)}
    text = str(BitDifference(range(7, 8), leaves, 2))
    assert "of step 7, on" in text
    assert "differ in 6 arrays: w0 (2 of 8 values, at most 0.5" in text
    assert "w3" in text
    assert "w4" not in text
    assert "and 2 more. A third" in text
    nan = differences({"a": np.float32([1, 2])}, {"a": np.float32([1, np.nan])})["a"]
    assert str(nan) == "1 of 2 values, not finite"

"""Callbacks: who is called when, who may stop a run, and when early stopping does."""

from __future__ import annotations

import json
import math
from typing import Any

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff import Callback, EarlyStopping, Monitor, StepInfo, StopTraining, TrainState
from distaff.callbacks import Callbacks
from distaff.errors import ConfigError, MetricError

EVENTS = (
    *("on_training_start", "on_step_end", "on_epoch_end", "on_validation_end"),
    *("on_checkpoint", "on_training_end"),
)


def info(**metrics: float) -> StepInfo:
    named = {f"val/{name}": value for name, value in metrics.items()}
    return StepInfo(3, 1, TrainState.create(params=jnp.ones(1)), named)


def stopped_after(stopping: EarlyStopping, losses: list[float]) -> int | None:
    """Returns the number of validations after which it asked to stop."""
    for count, loss in enumerate(losses, start=1):
        try:
            stopping.on_validation_end(info(loss=loss))
        except StopTraining:
            return count
    return None


class Stopper(Callback):
    def __init__(self, heard: list[Any], reason: str) -> None:
        self.heard, self.reason = heard, reason

    def on_epoch_end(self, info: StepInfo) -> None:
        self.heard.append((self.reason, info.step))
        raise StopTraining(self.reason)


def test_emit_calls_every_callback_in_order_and_keeps_the_first_reason():
    class Later(Callback):
        def on_checkpoint(self, info: StepInfo) -> None:
            raise StopTraining("later")

    heard: list[Any] = []
    stoppers = [Stopper(heard, "first"), Stopper(heard, "second")]
    callbacks = Callbacks([Later(), Callback(), *stoppers])
    callbacks.emit("on_validation_end", info())
    assert callbacks.stop_reason is None
    for event in ("on_epoch_end", "on_checkpoint"):
        callbacks.emit(event, info())
        assert (heard, callbacks.stop_reason) == ([("first", 3), ("second", 3)], "first")


def test_a_stop_without_a_reason_stops_all_the_same():
    callbacks = Callbacks([Stopper([], "")])
    callbacks.emit("on_epoch_end", info())
    assert (callbacks.stop_reason, callbacks.stop_status) == ("Stopper", "stopped")


def test_first_request_to_stop_decides_the_status():
    class Pruner(Callback):
        def on_epoch_end(self, info: StepInfo) -> None:
            raise StopTraining("hopeless", status="pruned")

    callbacks = Callbacks([Pruner(), Stopper([], "late")])
    callbacks.emit("on_epoch_end", info())
    assert (callbacks.stop_reason, callbacks.stop_status) == ("hopeless", "pruned")


def test_emit_lets_other_errors_through():
    class Broken(Callback):
        def on_checkpoint(self, info: StepInfo) -> None:
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        Callbacks([Broken()]).emit("on_checkpoint", info())


def test_watches_steps_only_where_a_callback_overrides_it():
    class Watcher(Callback):
        def on_step_end(self, info: StepInfo) -> None:
            """Looks."""

    class Inherited(Watcher):
        """Overrides it by inheritance."""

    assert not Callbacks([]).watches_steps
    assert not Callbacks([Callback(), EarlyStopping(Monitor("val/loss"))]).watches_steps
    assert Callbacks([Callback(), Inherited()]).watches_steps


def test_a_callback_hears_all_six_events_and_remembers_nothing_by_default():
    callback = Callback()
    callbacks = Callbacks([callback])
    for event in EVENTS:
        callbacks.emit(event, info())
    assert [name for name in vars(Callback) if name.startswith("on_")] == list(EVENTS)
    callback.set_state(callback.get_state())
    assert callback.get_state() == {}


@pytest.mark.parametrize(
    ("losses", "options", "stopped"),
    [
        ([5, 4, 3, 2, 1], {"patience": 1}, None),
        ([1, 1], {"patience": 1}, 2),
        ([1, 2, 2, 0.5, 2, 2, 2], {"patience": 3}, 7),
        ([1.0, 0.75, 0.5, 0.25], {"patience": 2, "min_delta": 0.25}, None),
        ([1.0, 0.9, 0.8, 0.7], {"patience": 2, "min_delta": 0.25}, 3),
        ([math.nan, math.nan, math.nan], {"patience": 2}, 3),
        ([math.nan, 2, 1], {"patience": 1}, None),
        ([1, math.nan, 0.5, math.nan, math.nan], {"patience": 2}, 5),
    ],
)
def test_early_stopping_bears_as_many_validations_as_it_has_patience(losses, options, stopped):
    stopping = EarlyStopping("val/loss", check_finite=False, **options)
    assert stopped_after(stopping, losses) == stopped


def test_early_stopping_says_what_has_not_improved():
    stopping = EarlyStopping(Monitor("val/accuracy", mode="max"), patience=2)
    for accuracy in (0.5, 0.75, 0.75):
        stopping.on_validation_end(info(accuracy=accuracy))
    with pytest.raises(StopTraining, match=r"val/accuracy has not improved on 0\.75 for 2 valid"):
        stopping.on_validation_end(info(accuracy=0.25))
    with pytest.raises(MetricError, match="'val/accuracy'"):
        stopping.on_validation_end(info(loss=1.0))


@settings(deadline=None)
@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True) | st.integers(0, 3), max_size=12),
    st.integers(0, 12),
)
def test_early_stopping_goes_on_from_its_state_as_if_never_interrupted(losses, cut):
    whole = EarlyStopping(Monitor("val/loss"), patience=2)
    expected = stopped_after(whole, losses)
    first, second = (EarlyStopping(Monitor("val/loss"), patience=2) for _ in range(2))
    before = stopped_after(first, losses[:cut])
    second.set_state(json.loads(json.dumps(first.get_state(), allow_nan=False)))
    after = stopped_after(second, losses[cut:])
    got = before if before is not None else None if after is None else len(losses[:cut]) + after
    assert got == expected


@pytest.mark.parametrize("options", [{"patience": 0}, {"min_delta": -0.1}, {"min_delta": math.nan}])
def test_early_stopping_refuses_options_out_of_range(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ConfigError, match=f"{name}.*{value}"):
        EarlyStopping(Monitor("val/loss"), **options)

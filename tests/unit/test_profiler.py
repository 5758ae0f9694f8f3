"""The profiler: a trace of the steps asked for, of a run that is as it would be without."""

from __future__ import annotations

import gzip
import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distaff
from distaff import Callback, Profiler, StopTraining, TrainerModule, data, zoo
from distaff.callbacks import Callbacks, WatchesChunks
from distaff.errors import ConfigError, NonFiniteError, StateError

NUM_STEPS = 10  # of an epoch


class Regression(TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])


def loader(bad: bool = False) -> data.ArrayLoader:
    x = np.linspace(-1, 1, 4 * NUM_STEPS, dtype=np.float32)
    y = np.full_like(x, np.nan) if bad else x
    return data.ArrayLoader({"x": x[:, None], "y": y}, batch_size=4)


def train(*callbacks: Callback, num_epochs: int = 3, **options: Any) -> tuple[Any, Any]:
    options = {"enable_progress_bar": False, "log_every_n_steps": 4, **options}
    trainer = Regression(zoo.MLP([4, 1]), callbacks=callbacks, **options)
    return trainer, trainer.train_model(loader(), num_epochs=num_epochs)


def events(folder: Path) -> list[dict[str, Any]]:
    """Returns the events of the only trace in a folder, in the form that Perfetto opens."""
    (trace,) = folder.rglob("*.trace.json.gz")
    return json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]


def annotated(folder: Path) -> list[tuple[int, int]]:
    """Returns the first step of each annotated chunk, and how many it has."""
    found = [event for event in events(folder) if event.get("name") == "train"]
    assert all(event["dur"] > 0 for event in found)
    return [(int(e["args"]["step_num"]), int(e["args"]["num_steps"])) for e in found]


def untimed(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


def is_profiling() -> bool:
    """Tells whether a trace is running, which it must not be once a test is over."""
    try:
        jax.profiler.stop_trace()
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize(
    ("steps_per_call", "chunks"),
    [(1, [(12, 1), (13, 1), (14, 1), (15, 1), (16, 1)]), (4, [(11, 4), (15, 4)])],
)
@pytest.mark.slow
def test_window_of_steps_is_recorded_and_the_run_is_as_without(steps_per_call, chunks):
    expected, without = train(steps_per_call=steps_per_call)
    trainer, result = train(Profiler(first_step=12, num_steps=5), steps_per_call=steps_per_call)
    assert annotated(result.path / "profile") == chunks
    assert len(events(result.path / "profile")) > 20 * len(chunks)  # what ran inside of them
    assert trainer.last_run.forms.chunk_size == expected.last_run.forms.chunk_size
    for one, other in zip(
        jax.tree.leaves(trainer.state.params), jax.tree.leaves(expected.state.params), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert untimed(result.path) == untimed(without.path)
    assert result.metrics == without.metrics
    assert "profile of" in (result.path / "log.txt").read_text()


@pytest.mark.slow
def test_default_window_begins_after_sixteen_chunks():
    _, result = train(Profiler(num_steps=3), steps_per_call=1)
    assert annotated(result.path / "profile") == [(17, 1), (18, 1), (19, 1)]


@pytest.mark.slow
def test_steps_stay_fused_where_auto_chooses():
    trainer, result = train(Profiler(first_step=1, num_steps=40), num_epochs=1)
    chunks = annotated(result.path / "profile")
    assert not trainer.callbacks.watches_steps
    assert sum(number for _, number in chunks) == NUM_STEPS
    assert len(chunks) < NUM_STEPS


def test_profiler_watches_chunks_and_other_callbacks_do_not():
    profiler = Profiler()
    assert Callbacks([Callback(), profiler]).chunk_watchers == [profiler]
    assert isinstance(profiler, WatchesChunks)


def test_window_ends_with_the_epoch():
    _, result = train(Profiler(first_step=9, num_steps=100), steps_per_call=1)
    assert annotated(result.path / "profile") == [(9, 1), (10, 1)]
    assert not is_profiling()


class Stopper(Callback):
    def on_step_end(self, info):
        if info.step == 3:
            raise StopTraining("enough")


class Breaker(Callback):
    def on_step_end(self, info):
        if info.step == 3:
            raise ZeroDivisionError


@pytest.mark.slow
def test_window_ends_with_a_stop():
    _, result = train(Stopper(), Profiler(first_step=2, num_steps=100))
    assert result.status == "stopped"
    assert annotated(result.path / "profile") == [(2, 1), (3, 1)]
    assert not is_profiling()


def test_window_ends_with_an_error():
    profile = Path("mine")
    with pytest.raises(ZeroDivisionError):
        train(Breaker(), Profiler(first_step=2, num_steps=100, path=profile), root=None)
    assert annotated(profile) == [(2, 1), (3, 1)]
    assert not is_profiling()


@pytest.mark.slow
def test_window_ends_with_a_loss_that_is_not_finite():
    trainer = Regression(
        zoo.MLP([1]),
        callbacks=[Profiler(first_step=1, num_steps=9, path="mine")],
        root=None,
        on_bad_input="ignore",
    )
    with pytest.raises(NonFiniteError):
        trainer.train_model(loader(bad=True), num_epochs=1)
    assert not is_profiling()


@pytest.mark.slow
def test_second_run_records_a_window_of_its_own():
    trainer, first = train(Profiler(first_step=2, num_steps=2), steps_per_call=1, num_epochs=1)
    second = trainer.train_model(loader(), num_epochs=1)
    assert annotated(first.path / "profile") == [(2, 1), (3, 1)]
    assert annotated(second.path / "profile") == [(11, 1), (12, 1)]


@pytest.mark.slow
def test_place_of_the_users_own_is_where_it_was_when_the_profiler_was_made(tmp_path, monkeypatch):
    profiler = Profiler(first_step=1, num_steps=1, path="mine")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    _, result = train(profiler, num_epochs=1)
    assert len(annotated(tmp_path / "mine")) == 1
    assert not (result.path / "profile").exists()


def test_run_without_a_directory_needs_a_place():
    with pytest.raises(ConfigError, match=r"root=None.*Profiler\(path="):
        train(Profiler(), root=None)


@pytest.mark.slow
def test_one_profile_at_a_time():
    with pytest.raises(StateError, match="one profile at a time"):
        train(Profiler(first_step=2, num_steps=3), Profiler(first_step=3), steps_per_call=1)
    assert not is_profiling()
    with jax.profiler.trace("mine"), pytest.raises(StateError, match="one profile at a time"):
        train(Profiler(first_step=1))
    profilers = Profiler(first_step=2, num_steps=2), Profiler(first_step=4, num_steps=1, path="b")
    _, result = train(*profilers, steps_per_call=1, num_epochs=1)
    assert annotated(result.path / "profile") == [(2, 1), (3, 1)]
    assert annotated(Path("b")) == [(4, 1)]


@pytest.mark.slow
def test_window_that_no_step_is_in_is_said():
    with pytest.warns(UserWarning, match=r"starts at step 99, and the run ended at step 10"):
        _, result = train(Profiler(first_step=99), num_epochs=1)
    assert not (result.path / "profile").exists()
    with pytest.warns(UserWarning, match=r"starts at chunk 17, and .* step 10 \(chunk 10\)"):
        train(Profiler(), num_epochs=1, steps_per_call=1)


@pytest.mark.parametrize("options", [{"num_steps": 0}, {"first_step": 0}])
def test_profiler_refuses_what_is_out_of_range(options):
    with pytest.raises(ConfigError, match="num_steps >= 1"):
        Profiler(**options)


def test_any_callback_may_stand_around_epochs_and_chunks():
    heard: list[Any] = []

    class Witness(Callback):
        @contextmanager
        def around_epoch(self, directory):
            heard.append(("epoch", directory))

            @contextmanager
            def around_chunk(steps):
                heard.append(steps)
                yield

            yield around_chunk
            heard.append("end")

    _, result = train(Witness(), steps_per_call=4, num_epochs=1)
    folder = Path(result.path).absolute()
    assert heard == [("epoch", folder), range(1, 5), range(5, 9), range(9, 11), "end"]


def test_profiler_is_exported():
    assert distaff.Profiler is Profiler

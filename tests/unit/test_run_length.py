"""Examples, tokens and time: where they end and interrupt a run, the same however it is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff import Callback, OptimizerConfig, TrainerModule, data, tasks
from distaff.core.config.cadence import Count, Every
from distaff.errors import BatchError, CheckpointError, ConfigError
from distaff.execution.feed.chunk import ChunkSize
from distaff.execution.feed.feed import Feed
from distaff.execution.feed.room import Room
from distaff.zoo import GPT, MLP
from scripted import InterruptError

COUNT = 38
ROWS = {
    "x": np.random.default_rng(0).normal(size=(COUNT, 4)).astype(np.float32),
    "length": (np.arange(COUNT, dtype=np.int32) * 7) % 5,
}
FIXED = {"root": None, "log_every_n_steps": 3, "enable_progress_bar": False, "tune_process": False}


def rows() -> data.ArrayLoader:
    return data.ArrayLoader(ROWS, 4, shuffle=True, seed=3)


def length_of(batch: Any) -> int:
    return int(batch["length"].sum())


class Rows(TrainerModule):
    """A regression with dropout, whose examples have between 0 and 4 tokens."""

    def __init__(self, **options: Any) -> None:
        super().__init__(MLP((4, 3, 1), dropout=0.3), **{**FIXED, **options})

    def loss_fn(self, params, batch, ctx):
        return jnp.abs(ctx.apply(params, batch["x"]))[:, 0]

    def count_tokens(self, batch):
        return length_of(batch)


class Last(Callback):
    """Keeps the arrays at the end, and the steps at which it validated and saved."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.killed_at, self.validated, self.saved = killed_at, [], []

    def on_step_end(self, info):
        if info.step == self.killed_at:
            raise InterruptError

    def on_validation_end(self, info):
        self.validated.append(info.step)

    def on_checkpoint(self, info):
        self.saved.append(info.step)

    def on_training_end(self, info):
        self.arrays = jax.tree.map(np.asarray, {**info.state.arrays(), "rng": None})


def expected_counts(limit: int, count: Callable[[Any], int]) -> list[int]:
    """The counts after each step, from 0 on, up to the first that reaches the limit."""
    loader = rows()
    totals = [0, *np.cumsum([count(batch) for _ in range(9) for batch in loader]).tolist()]
    return totals[: 1 + next(n for n, total in enumerate(totals) if total >= limit)]


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=20),
    every=st.integers(1, 30),
    steps=st.integers(1, 9),
    limit=st.integers(1, 60),
    splits=st.lists(st.integers(1, 4), max_size=6),
    capacity=st.integers(1, 9),
)
def test_chunks_end_where_something_is_due_however_a_run_is_split(
    sizes, every, steps, limit, splits, capacity
):
    batches = [{"n": np.full((size, 2), 3 * i % 7)} for i, size in enumerate(sizes)]
    cadences = [Every(every, "tokens"), Every(steps, "steps"), Every(limit, "examples")]
    totals = np.cumsum([[len(b["n"]), b["n"].sum()] for b in batches], axis=0)

    ends, counts, step, position = [], {}, 0, data.Stream(batches).get_state()
    for most in [*splits, None]:
        loader = data.Stream(batches)
        loader.set_state(position)
        chunks = Feed(loader, name="train", resident=False).epoch(
            lambda: ChunkSize(capacity, capacity),
            room=Room(cadences, step, counts, lambda batch: batch["n"].sum()),
            done=step,
        )
        with closing(chunks):
            for chunk in islice(chunks, most):
                step, counts, position = step + chunk.num_steps, chunk.counts, chunk.position
                ends.append(step)
                assert (counts["examples"].now, counts["tokens"].now) == tuple(totals[step - 1])
        if step == len(batches):
            break
    before = np.concatenate([[[0, 0]], totals[:-1]])
    is_due = (totals // [limit, every] > before // [limit, every]).any(axis=1)
    is_due |= np.arange(1, len(batches) + 1) % steps == 0
    assert {int(n) + 1 for n in np.flatnonzero(is_due)} <= {*ends}
    assert step == len(batches)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of 90 tokens, one step per call, which validates every 25 tokens."""
    last, root = Last(), tmp_path_factory.mktemp("whole")
    options = {"val_every": "25 tokens", "save_every": "9 examples", "steps_per_call": 1}
    trainer = Rows(callbacks=[last], root=root, **options)
    return last, trainer.train_model(rows(), rows(), num_epochs="90 tokens")


def assert_same(last: Last, result: Any, whole: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, last.arrays, whole[0].arrays)
    assert (result.step, result.metrics, result.best) == (
        whole[1].step,
        whole[1].metrics,
        whole[1].best,
    )


def log_of(path: Path) -> list[dict[str, Any]]:
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [{n: x for n, x in json.loads(line).items() if n != "time"} for line in lines]


def test_a_run_of_so_many_tokens_ends_validated_saved_and_counted(whole):
    last, result = whole
    totals = expected_counts(90, length_of)
    due = [n for n in range(1, len(totals)) if totals[n] // 25 > totals[n - 1] // 25]
    assert (result.status, result.step) == ("finished", len(totals) - 1)
    assert last.validated == [*due, *({result.step} - {*due})] == last.saved
    assert totals[-2] < 90 <= totals[-1] == result.history["tokens"][-1]
    config = json.loads((result.path / "config.json").read_text())
    assert config["num_epochs"] == "90 tokens"
    assert config["identity"]["total_steps"] == -(-90 // length_of(next(iter(rows()))))


@pytest.mark.slow
def test_fused_steps_end_and_validate_at_the_same_steps(whole):
    last = Last()
    options = {"val_every": "25 tokens", "save_every": "9 examples", "steps_per_call": 4}
    trainer = Rows(callbacks=[last], **options)
    fused = trainer.train_model(rows(), rows(), num_epochs="90 tokens")
    assert trainer.last_run.forms.capacity == 4
    assert_same(last, fused, whole)
    assert last.validated == whole[0].validated


@pytest.mark.parametrize("killed_at", [5, 12])
@pytest.mark.slow
def test_killed_it_resumes_with_its_counts_bit_for_bit(whole, killed_at, tmp_path):
    def run(last: Last) -> Any:
        options = {"val_every": "25 tokens", "save_every": "9 examples", "steps_per_call": 4}
        trainer = Rows(callbacks=[last], root=tmp_path, **options)
        return trainer.train_model(rows(), rows(), num_epochs="90 tokens")

    with pytest.raises(InterruptError):
        run(Last(killed_at))
    last = Last()
    resumed = run(last)
    assert len(list((tmp_path / "rows").iterdir())) == 1
    jax.tree.map(np.testing.assert_array_equal, last.arrays, whole[0].arrays)
    assert log_of(resumed.path) == log_of(whole[1].path)
    assert (resumed.step, resumed.best) == (whole[1].step, whole[1].best)


@pytest.mark.slow
def test_a_run_that_did_not_count_cannot_end_by_what_it_did_not_count(tmp_path):
    def run(num_epochs: Any, last: Last) -> Any:
        trainer = Rows(
            callbacks=[last], root=tmp_path, save_every="2 steps", optimizer=optax.sgd(0.1)
        )
        return trainer.train_model(rows(), rows(), num_epochs=num_epochs)

    with pytest.raises(InterruptError):
        run(2, Last(7))
    with pytest.raises(CheckpointError, match=r"without counting its tokens.*'90 tokens'"):
        run("90 tokens", Last())


@pytest.mark.slow
def test_examples_are_the_rows_of_each_batch_and_a_second_run_counts_its_own():
    trainer = Rows(optimizer=optax.sgd(0.1), val_every="12 examples")
    for _ in range(2):
        result = trainer.train_model(data.ArrayLoader(ROWS, 4), rows(), num_epochs="50 examples")
        assert result.history["examples"].tolist() == [12, 24, 36, 38, 50]  # 38 of one epoch
    assert result.step == 26


@pytest.mark.slow
def test_a_time_ends_a_run_as_finished(monkeypatch):
    def seconds(recorder: Any) -> dict[str, Count]:
        before = recorder.state.counts.get("seconds", Count(0, 0)).now
        return {"seconds": Count(before, before + 1.5)}

    monkeypatch.setattr("distaff.run.recorder.Recorder._seconds", seconds)
    trainer = Rows(optimizer=optax.sgd(0.1), steps_per_call=1)
    result = trainer.train_model(rows(), rows(), num_epochs="20s")
    assert (result.status, result.step, result.epoch) == ("finished", 14, 2)
    assert result.history.steps["val/loss"].tolist() == [9, 14]
    with pytest.raises(ConfigError, match=r"'cosine'.*the run ends after a time"):
        Rows(optimizer=OptimizerConfig("adam")).train_model(rows(), num_epochs="20s")


@pytest.mark.slow
def test_batches_unlike_the_first_are_named_as_the_schedule_was_planned_by_it(tmp_path):
    sizes = [1, *[6] * 20]
    batches = [{**ROWS, "length": np.full(COUNT, n, np.int32)} for n in sizes]
    trainer = Rows(optimizer=OptimizerConfig("adam"), root=tmp_path)
    result = trainer.train_model(batches, num_epochs=f"{COUNT * 31} tokens")
    text = (result.path / "log.txt").read_text()
    assert "took 6 steps, but the first batch suggested 31" in text


def test_what_cannot_be_counted_says_what_to_define():
    class Silent(Rows):
        count_tokens = None

    run = partial(Silent().train_model, rows(), num_epochs="9 tokens")
    with pytest.raises(ConfigError, match=r"Define count_tokens\(self, batch\)"):
        run()
    with pytest.raises(ConfigError, match=r"Define count_tokens\(self, batch\)"):
        Silent(save_every="9 tokens").train_model(rows(), num_epochs=1)
    with pytest.raises(ConfigError, match=r"Did you mean|num_epochs=\"1e9 tokens\""):
        Rows().train_model(rows(), budget="1e9 tokens")
    on_device = [jax.tree.map(jnp.asarray, ROWS)]
    with pytest.raises(BatchError, match=r"'(x|length)' is a JAX array.*Yield NumPy"):
        Rows().train_model(on_device, num_epochs="9 tokens")
    for wrong in (lambda self, batch: -1, lambda self, batch: 1.5, lambda self, batch: [1, 2]):
        kind = type("Wrong", (Rows,), {"count_tokens": wrong})
        with pytest.raises(BatchError, match="an integer of at least 0; got"):
            kind().train_model(rows(), num_epochs="9 tokens")


def test_a_language_model_counts_the_tokens_of_its_loss():
    tokens = np.array([[1, 2, 3, 0], [4, 0, 0, 0]], np.int32)
    model = GPT(vocab_size=8, max_length=4, num_layers=1, num_heads=1, features=4)
    plain, ignoring = (
        tasks.LanguageModel(model, ignore_index=ignored, **FIXED) for ignored in (None, 0)
    )
    assert plain.count_tokens({"tokens": tokens}) == plain.count_tokens(tokens) == 6
    assert ignoring.count_tokens({"tokens": tokens}) == 2
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    assert plain.count_tokens({"tokens": tokens, "mask": mask}) == 3
    padded = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)
    assert plain.count_tokens({"tokens": tokens, "mask": padded}) == 2
    weighted = {"tokens": tokens, "sample_weight": np.array([0.0, 2.0], np.float32)}
    assert plain.count_tokens(weighted) == 3
    segments = np.array([[1, 1, 2, 0], [1, 1, 1, 1]])
    assert plain.count_tokens({"tokens": tokens, "segment_ids": segments}) == 4

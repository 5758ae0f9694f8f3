"""Mixtures when something goes wrong: errors, interruptions, ends of runs, shared loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import distaff
from distaff import data
from distaff.data import ArrayLoader, Limited, MappedLoader, Mixture, Stream
from distaff.errors import BatchError, ConfigError
from distaff.testing.loaders import assert_batches_equal

REACH = 100


def rows(source: int, count: int = 12, batch_size: int = 3, **options: Any) -> ArrayLoader:
    return ArrayLoader({"x": np.arange(count) + source * REACH}, batch_size, **options)


def even(loaders: dict[str, Any], **options: Any) -> Mixture:
    return Mixture(loaders, dict.fromkeys(loaders, 1), **options)


SHARED = rows(0)


@pytest.mark.parametrize(
    "other",
    [
        MappedLoader(SHARED, lambda batch: batch),
        Limited(MappedLoader(SHARED, lambda batch: batch), 2),
        even({"c": rows(1), "d": MappedLoader(SHARED, lambda batch: batch)}),
    ],
    ids=["mapped", "limited", "mixture"],
)
def test_loaders_over_one_inner_loader_are_refused(other):
    with pytest.raises(ConfigError, match="'a' and 'b' are the same object, or read the same one"):
        even({"a": SHARED, "b": other})
    again = MappedLoader(other, lambda batch: batch)
    with pytest.raises(ConfigError, match="'a' and 'b' are the same object, or read the same one"):
        even({"a": again, "b": other})


class Trips:
    """A function of batches that fails at some of its calls."""

    def __init__(self, calls: set[int]) -> None:
        self.calls, self.count = calls, 0

    def __call__(self, batch: Any) -> Any:
        self.count += 1
        if self.count - 1 in self.calls:
            raise OSError("a read failed")
        return batch


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sets(st.integers(0, 15), max_size=6), min_size=2, max_size=3),
    st.sampled_from(["example", "batch"]),
    st.integers(1, 8),
)
def test_iteration_goes_on_exactly_after_errors_of_any_loader(failures, by, size):
    def make(calls: list[set[int]]) -> Mixture:
        loaders = {
            f"s{i}": MappedLoader(rows(i, 7 + i, shuffle=bool(i)), Trips(each))
            for i, each in enumerate(calls)
        }
        options = {} if by == "batch" else {"batch_size": size}
        return even(loaders, by=by, num_batches=10, **options)

    whole = make([set()] * len(failures))
    failing, found = make(failures), []
    errors = 0
    while len(found) < 10:
        try:
            found.append(failing.peek())
        except OSError:
            errors += 1
            continue
        failing.set_state(failing.get_state())
        next(iter(failing))
    assert_batches_equal(found, list(whole))
    assert errors <= sum(map(len, failures))


def test_error_leaves_position_and_rows_of_the_other_loaders():
    trips = Trips({2})  # the second batch; the first call looks at the first one
    loader = even({"a": rows(0), "b": MappedLoader(rows(1), trips)}, batch_size=6)
    first = loader.peek()
    next(iter(loader))
    before = loader.get_state()
    with pytest.raises(OSError, match="a read failed"):
        loader.peek()
    assert loader.get_state() == before
    second = loader.peek()
    found = np.sort(np.concatenate([first["x"], second["x"]]))
    np.testing.assert_array_equal(found, [*range(6), *range(REACH, REACH + 6)])


def test_source_that_cannot_be_added_takes_no_batch():
    batches = [{"x": np.arange(2)}, {"source": np.arange(2)}]
    loader = Mixture({"a": batches}, {"a": 1}, by="batch", num_batches=9, with_source=True)
    running = iter(loader)
    next(running)
    before = loader.get_state()
    for _ in range(2):
        with pytest.raises(BatchError, match="with_source adds"):
            loader.peek()
        assert loader.get_state() == before


class Closes:
    """An iterable that tells how often it is open."""

    open = 0

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        self.open += 1
        try:
            yield from rows(1)
        finally:
            self.open -= 1


def mapped(loader: Any) -> MappedLoader:
    return MappedLoader(loader, lambda batch: batch)


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, mapped, lambda x: Limited(mapped(x), 3), lambda x: mapped(even({"y": x}))],
    ids=["mixture", "mapped", "limited", "twice"],
)
def test_what_a_mixture_within_a_mixture_made_is_closed(wrap):
    source, own = Closes(), rows(0)
    loader = even({"inner": wrap(even({"a": source})), "own": own}, batch_size=2, num_batches=4)
    start = loader.get_state()
    first = next(iter(loader))
    loader.peek()
    assert source.open == 1
    with data.closing_made((loader, loader)):
        pass
    assert source.open == 0
    # The row that was in line is still to come; what was closed begins anew.
    assert sorted(loader.peek()["x"].tolist()) == [1, REACH]
    loader.set_state(start)
    assert_batches_equal([next(iter(loader))], [first])


@pytest.mark.parametrize("given", [list, lambda batches: lambda: iter(batches)])
def test_mixture_of_iterables_goes_back_after_a_run_was_closed(given):
    def make() -> Mixture:
        loaders = {"a": given(list(rows(1))), "b": rows(0, shuffle=True)}
        return even({"c": even(loaders, num_batches=5), "d": given(list(rows(2)))}, num_batches=9)

    whole, loader = list(make()), make()
    found = list(islice(loader, 4))
    state = loader.get_state()
    for _ in range(2):
        loader.peek()
        assert loader.close_made()
        loader.peek()
        loader.set_state(state)
        assert_batches_equal([*found, *loader], whole)


def test_closed_mixture_is_at_the_start_of_its_iterables_and_keeps_its_proportions():
    def make() -> Mixture:
        return Mixture({"a": list(rows(0)), "b": lambda: iter(rows(1))}, {"a": 2, "b": 1})

    loader = make()
    list(islice(loader, 5))
    taken = loader.get_state()["taken"]
    loader.peek()
    loader.close_made()
    assert loader.get_state()["loaders"] == make().get_state()["loaders"]
    assert loader.get_state()["taken"] == taken


def test_iterator_in_a_mixture_goes_on_after_a_run():
    loader = even({"a": iter(list(rows(0)))}, batch_size=3, num_batches=4)
    next(iter(loader))
    loader.close_made()
    assert next(iter(loader))["x"].tolist() == [3, 4, 5]


def test_mixture_that_made_nothing_has_nothing_closed():
    loader = even({"a": mapped(even({"b": rows(0)})), "c": Stream([{"x": np.arange(3)}])})
    loader.peek()
    before = loader.get_state()
    assert not loader.close_made()
    assert loader.get_state() == before


class Regression(distaff.TrainerModule):
    def print_tabulate(self, example_batch):
        pass

    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])


class Stop(distaff.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, info):
        if info.step == self.step:
            raise KeyboardInterrupt


def pairs(seed: int, count: int) -> list[dict[str, np.ndarray]]:
    x = np.random.default_rng(seed).normal(size=(count, 4, 3)).astype(np.float32)
    return [{"x": each, "y": each.sum(1)} for each in x]


def lists() -> Mixture:
    return Mixture({"a": pairs(0, 8), "b": pairs(1, 3)}, {"a": 2, "b": 1}, num_batches=5)


def train(loader: Any, *callbacks: Any, **options: Any) -> Any:
    options = {
        "root": None,
        "enable_progress_bar": False,
        "save_every": 1e-9,
        "steps_per_call": 1,
        **options,
    }
    fit = Regression(nn.Dense(1), callbacks=callbacks, **options)
    fit.train_model(loader, num_epochs=3)
    return fit.state.params


def test_interrupted_run_over_lists_goes_on_in_the_same_process(tmp_path: Path):
    loader, kept = lists(), {"root": tmp_path, "name": "mix"}
    with pytest.raises(KeyboardInterrupt):
        train(loader, Stop(7), **kept)
    resumed = train(loader, Stop(0), resume="must", **kept)
    assert jax.tree.all(jax.tree.map(np.array_equal, resumed, train(lists())))


WRAPPED: list[Callable[[Any], data.Loader]] = [
    lambda batches: mapped(Stream(batches)),
    lambda batches: Limited(Stream(batches), 3),
    lambda batches: even({"a": pairs(1, 3), "b": batches}, num_batches=3),
    lambda batches: mapped(even({"a": even({"b": mapped(Stream(batches))})}, num_batches=3)),
]


@pytest.mark.parametrize("wrap", WRAPPED)
def test_what_cannot_go_back_within_a_loader_is_refused_before_anything_is_written(wrap, tmp_path):
    root = tmp_path / "runs"
    with pytest.raises(ConfigError, match=r"rollback.*a plain iterable cannot"):
        train(wrap(pairs(0, 8)), root=root, on_bad_numbers="rollback")
    assert not root.exists()


@pytest.mark.parametrize("wrap", WRAPPED)
def test_iterator_within_a_loader_is_refused_before_anything_is_written(wrap, tmp_path):
    root = tmp_path / "runs"
    with pytest.raises(BatchError, match=r"train loader .* in each of 3 epochs.*only once"):
        train(wrap(iter(pairs(0, 8))), root=root)
    assert not root.exists()

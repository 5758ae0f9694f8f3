"""Mixtures: exact proportions, nothing lost or repeated, and every position found again."""

from __future__ import annotations

import doctest
import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import islice
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import distaff
from distaff import data, metrics
from distaff.core.config import checks
from distaff.data import ArrayLoader, Mixture, Stream
from distaff.data.wrappers import mixture, proportions
from distaff.errors import BatchError, ChangedBatchesError, ConfigError
from distaff.testing.loaders import assert_batches_equal

REACH = 100_000
"""Rows of source `i` are numbered from `i * REACH`."""


def numbers(source: int, rows: int, batch_size: int, **options: Any) -> ArrayLoader:
    return ArrayLoader({"x": np.arange(rows) + source * REACH}, batch_size, **options)


def stream(source: int, rows: int, batch_size: int) -> Stream:
    return Stream(lambda: iter(numbers(source, rows, batch_size)))


def pair(**options: Any) -> Mixture:
    loaders = {"web": numbers(0, 12, 3, shuffle=True), "books": numbers(1, 5, 2)}
    return Mixture(loaders, {"web": 2, "books": 1}, **options)


def weights_of(counts: list[int]) -> st.SearchStrategy[list[float]]:
    whole = st.integers(1, 40)
    weight = st.one_of(whole, whole.map(lambda n: n / 8), st.floats(0.01, 50))
    return st.lists(weight, min_size=len(counts), max_size=len(counts))


@st.composite
def makers(draw: Callable[..., Any]) -> Callable[[], Mixture]:
    """Returns what makes one mixture, always the same: of arrays, shuffled or not, and streams."""
    forms = draw(
        st.lists(
            st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(0, 2)), min_size=1
        ).filter(lambda found: len(found) <= 4)
    )
    weights = draw(weights_of(forms))
    options: dict[str, Any] = {"num_batches": draw(st.integers(1, 6))}
    options["by"] = draw(st.sampled_from(["example", "batch"]))
    if options["by"] == "example":
        options["batch_size"] = draw(st.integers(1, 9))

    def loader(index: int, rows: int, size: int, kind: int) -> data.Loader:
        if kind == 2:
            return stream(index, rows, size)
        return numbers(index, rows, size, shuffle=bool(kind), remainder="keep")

    def make() -> Mixture:
        loaders = {f"s{i}": loader(i, *form) for i, form in enumerate(forms)}
        return Mixture(loaders, dict(zip(loaders, weights, strict=True)), **options)

    return make


def taken(loader: data.Loader, count: int) -> list[Any]:
    """Returns so many batches, over epochs, of a loader that goes on."""
    return list(islice((batch for _ in range(count) for batch in loader), count))


@settings(deadline=None, max_examples=80)
@given(makers(), st.integers(0, 12), st.integers(0, 12))
def test_resumed_mixture_goes_on_as_one_that_ran_through(make, stop, looks):
    uninterrupted, stopped, resumed = make(), make(), make()
    expected = taken(uninterrupted, 24)
    running = (batch for _ in range(24) for batch in stopped)
    found = []
    for step in range(stop):
        if step == looks:
            stopped.peek()
        found.append(next(running))
    state = json.loads(json.dumps(stopped.get_state()))
    resumed.set_state(state)
    assert resumed.get_state() == state
    resumed.peek()
    assert resumed.get_state() == state
    rest = [*resumed]  # of the epoch, which may be nothing
    assert_batches_equal([*found, *rest, *taken(resumed, 24 - stop)][:24], expected)


@settings(deadline=None, max_examples=80)
@given(makers())
def test_rows_of_each_source_come_in_its_own_order_and_none_twice_or_never(make):
    loader = make()
    found = np.concatenate([batch["x"] for batch in taken(loader, 20)])
    for index, reader in enumerate(make()._readers):
        mine = found[found // REACH == index]
        epochs = [np.concatenate([b["x"] for b in reader.loader]) for _ in range(1 + len(mine))]
        np.testing.assert_array_equal(mine, np.concatenate(epochs)[: len(mine)])


WHOLE, ANY = st.integers(1, 30), st.floats(1e-9, 1e9)
WEIGHTS = st.one_of(*(st.lists(each, min_size=1, max_size=12) for each in (WHOLE, ANY)))


@settings(deadline=None, max_examples=100)
@given(WEIGHTS, st.data())
def test_turns_are_shares_to_within_one_at_every_prefix(weights, draws):
    shares = proportions.shares(weights)
    count = draws.draw(st.integers(1, min(2 * sum(shares), 700)))
    had = [0] * len(shares)
    bound = 1 - Fraction(1, max(2 * len(shares) - 2, 1)) if len(shares) > 1 else 0
    cut = draws.draw(st.integers(0, count))
    whole = [*proportions.turns(shares, had, cut).tolist()]
    reached = [whole.count(index) for index in range(len(shares))]
    whole += proportions.turns(shares, reached, count - cut).tolist()
    assert whole == proportions.turns(shares, had, count).tolist()
    for turn, chosen in enumerate(whole, 1):
        had[chosen] += 1
        due = [Fraction(share * turn, sum(shares)) for share in shares]
        assert max(abs(each - count) for each, count in zip(due, had, strict=True)) <= bound


@pytest.mark.parametrize("module", [mixture, proportions, checks])
def test_examples_in_docstrings_are_right(module):
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


def test_shares_are_the_proportions_that_were_written():
    assert proportions.shares([0.1, 0.2, np.float32(0.7)]) == (1, 2, 7)
    assert proportions.shares([2, np.int64(4), Fraction(1, 3)]) == (6, 12, 1)
    assert proportions.shares([1e-300, 1]) == (1, 10**300)


def test_turns_are_the_callers_own_and_what_is_kept_of_them_is_small():
    first = proportions.turns((3, 1), (0, 0), 4)
    first[:] = 7
    assert proportions.turns((3, 1), (3, 1), 4).tolist() == [0, 0, 1, 0]
    kept = proportions._period.cache_info().maxsize * proportions._LONGEST_ROUND * first.itemsize
    assert kept <= 2**22


def test_long_mixtures_are_drawn_to_within_one_row():
    web, books = numbers(0, 64, 16), numbers(1, 64, 16)
    loader = Mixture({"web": web, "books": books}, {"web": 0.731, "books": 0.269}, batch_size=250)
    rows = np.concatenate([batch["x"] // REACH for batch in taken(loader, 40)])
    assert abs(int((rows == 0).sum()) - 7310) <= 1


def test_epoch_holds_as_many_rows_as_the_loaders_have():
    assert len(pair()) == (12 + 6) // 3
    assert len(pair(batch_size=100)) == 1
    assert len(pair(num_batches=9)) == 9
    assert len(pair(by="batch")) == 4 + 3
    weights = {"a": np.float32(0.5), "b": Fraction(1, 2)}
    assert len(Mixture({"a": numbers(0, 4, 2), "b": numbers(1, 4, 2)}, weights)) == 4
    assert [len(batch["x"]) for batch in pair(batch_size=4)] == [4] * 4


def test_mixture_without_a_known_length_has_no_end():
    loaders = {"web": numbers(0, 4, 2), "books": stream(1, 3, 2)}
    loader = Mixture(loaders, {"web": 1, "books": 1})
    with pytest.raises(TypeError, match="steps_per_epoch"):
        len(loader)
    assert data.num_batches(loader) is None
    assert len(list(islice(loader, 50))) == 50


def test_source_of_each_row_is_told_by_the_order_of_names():
    for options in ({"batch_size": 5}, {"by": "batch"}):
        for batch in pair(with_source=True, **options):
            np.testing.assert_array_equal(batch["source"], batch["x"] // REACH)
            assert batch["source"].dtype == np.int32


@pytest.mark.parametrize(
    ("batches", "found"),
    [([np.arange(2)], "ndarray"), ([{"source": np.arange(2)}], r"the keys \['source'\]")],
)
def test_source_is_added_to_dicts_without_it_only(batches, found):
    with pytest.raises(BatchError, match=f"with_source.*got {found}"):
        data.first_batch(Mixture({"a": batches}, {"a": 1}, with_source=True))


def test_jax_arrays_are_mixed_with_doubles_of_numpy():
    loader = Mixture({"a": [jnp.arange(3)], "b": [np.arange(10, 12)]}, {"a": 1, "b": 1})
    (batch,) = loader
    assert (batch.tolist(), batch.dtype) == ([0, 10, 1], np.int32)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"x": np.zeros((2, 3))}, r"'x': float32 \[batch, 3\] and int32 \[batch\]"),
        ({"x": np.arange(2, dtype=np.int16)}, r"'x': int16 \[batch\] and int32 \[batch\]"),
        ({"x": np.arange(2), "y": np.arange(2)}, r"'y': int32 \[batch\] and none"),
        ({}, "at least one array"),
        ([np.arange(2)], r"'x': none and int32 \[batch\]"),
    ],
)
def test_sources_of_other_forms_are_refused_before_the_first_batch(other, difference):
    loaders = {"web": [{"x": np.arange(2)}] * 9, "books": [other]}
    with pytest.raises(BatchError, match=rf"books.*{difference}"):
        Mixture(loaders, {"web": 1000, "books": 1}).get_state()


def test_form_that_changes_later_is_refused():
    batches = [{"x": np.arange(2)}, {"x": np.arange(2.0)}]
    with pytest.raises(BatchError, match=r"'books' and 'web' differ in 'x': float32"):
        list(Mixture({"web": batches[:1], "books": batches}, {"web": 1, "books": 1}, num_batches=9))
    whole = Mixture({"web": batches[:1], "books": batches}, {"web": 1, "books": 1}, by="batch")
    assert [batch["x"].dtype.kind for batch in whole] == ["i", "i", "i"]


def test_structures_of_the_same_leaves_are_told_apart():
    with pytest.raises(BatchError, match=r"structure: PyTreeDef\(\[\*\]\) and PyTreeDef"):
        data.first_batch(Mixture({"a": [(np.ones(1),)], "b": [[np.ones(1)]]}, {"a": 1, "b": 1}))


SAME = numbers(0, 4, 2)


@pytest.mark.parametrize(
    ("loaders", "weights", "options", "complaint"),
    [
        ({"a": [1]}, {"a": 0}, {}, "that of 'a' is 0. Remove 'a'"),
        ({"a": [1]}, {"a": -1}, {}, "positive, finite number; that of 'a' is -1"),
        ({"a": [1]}, {"a": float("nan")}, {}, "that of 'a' is nan"),
        ({"a": [1]}, {"a": float("inf")}, {}, "that of 'a' is inf"),
        ({"a": [1]}, {"a": True}, {}, "that of 'a' is True"),
        ({"a": [1]}, {"a": "1"}, {}, "that of 'a' is '1'"),
        ({"a": [1]}, {"a": 10**400}, {}, "that of 'a' is 1000"),
        ({"a": [1]}, {"b": 1}, {}, r"loaders \['a'\] and weights of \['b'\]"),
        ({1: [1]}, {1: 1}, {}, "a str; got the loaders"),
        ({}, {}, {}, "takes a dict of loaders by name"),
        ([[1]], [1], {}, "got list and list"),
        ({"a": SAME, "b": SAME}, {"a": 1, "b": 1}, {}, "'a' and 'b' are the same object"),
        ({"a": SAME}, {"a": 1}, {"by": "batches"}, "Did you mean 'batch'"),
        (
            {"a": SAME},
            {"a": 1},
            {"by": "batch", "batch_size": 2},
            "batch_size=2. Set it in the loaders",
        ),
        ({"a": SAME}, {"a": 1}, {"batch_size": 0}, "batch_size must be an integer, at least 1"),
        ({"a": SAME}, {"a": 1}, {"num_batches": 2.0}, "num_batches must be an integer"),
    ],
)
def test_bad_options_are_refused(loaders, weights, options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Mixture(loaders, weights, **options)


def test_loader_that_is_none_or_empty_is_named():
    with pytest.raises(BatchError, match="The books loader must yield batches; got ndarray"):
        Mixture({"books": np.arange(3)}, {"books": 1})
    with pytest.raises(BatchError, match="The books loader must yield at least one batch"):
        data.first_batch(Mixture({"books": []}, {"books": 1}))


def test_generator_that_is_used_up_is_named():
    loaders = {"web": [np.arange(3)] * 3, "books": iter([np.arange(3)])}
    loader = Mixture(loaders, {"web": 1, "books": 1}, num_batches=3)
    with pytest.raises(BatchError, match=r"the books loader: .* can be iterated only once"):
        list(loader)


@pytest.mark.parametrize(
    "change",
    [
        {"shares": [1, 2]},
        {"names": ["books", "web"]},
        {"by": "batch"},
        {"batch_size": 4},
        {"num_batches": 7},
        {"batch": 7},
        {"batch": -1},
        {"batch": None},
        {"taken": [1]},
        {"taken": [1, 1.5]},
        {"loaders": [{}, {}]},
        {"loaders": None},
    ],
)
def test_position_of_another_mixture_is_refused_and_nothing_moves(change):
    loader, same = pair(), pair()
    taken(loader, 2), taken(same, 2)
    before = loader.get_state()
    with pytest.raises(BatchError, match="a mixture with the same loaders and options"):
        loader.set_state({**before, **change})
    assert loader.get_state() == before
    loader.set_state(before), same.set_state(before)
    assert_batches_equal(list(loader), list(same))


def test_position_that_one_loader_does_not_take_moves_none():
    def make() -> Mixture:
        return Mixture({"web": numbers(0, 12, 3), "books": stream(1, 5, 2)}, {"web": 2, "books": 1})

    loader, same = make(), make()
    start = loader.get_state()
    found, expected = islice(loader, 7), islice(same, 9)
    list(found), list(islice(expected, 7))
    before = loader.get_state()
    with pytest.raises(BatchError, match="the books loader: A Stream cannot go back"):
        loader.set_state(start)
    assert loader.get_state() == before
    loader.set_state(before)
    assert_batches_equal(list(islice(loader, 2)), list(expected))


def test_mixture_goes_back_within_the_batches_that_its_streams_have_handed_out():
    loader = Mixture(
        {"a": stream(0, 20, 10), "b": numbers(1, 3, 1)}, {"a": 2, "b": 1}, batch_size=3
    )
    first = next(iter(loader))
    state = loader.get_state()
    loader.set_state(state)
    rest = list(islice(loader, 3))
    loader.set_state(state)
    assert_batches_equal(list(islice(loader, 3)), rest)
    assert first["x"].tolist() == [0, REACH, 1]


class Draws:
    """Yields other numbers each time that it is made."""

    made = 0

    def __call__(self) -> Iterator[np.ndarray]:
        Draws.made += 1
        rng = np.random.default_rng(Draws.made)
        for _ in range(3):
            yield rng.integers(REACH, size=4)


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_source_that_yields_other_batches_again_is_refused(steps):
    # After one step, the Stream itself has handed out none that it could tell.
    def make() -> Mixture:
        return Mixture({"a": Draws(), "b": [np.arange(4)]}, {"a": 1, "b": 1}, num_batches=9)

    loader, again = make(), make()
    next(islice(loader, steps - 1, None))
    state = loader.get_state()
    with pytest.raises(ChangedBatchesError, match=r"[Tt]he a loader"):
        again.set_state(state)
    there = again.get_state()
    assert there["taken"] == state["taken"]
    again.set_state(there)  # as an inexact resume does
    assert len(list(again)) == 9 - steps


def test_batch_of_which_rows_were_used_may_be_too_short_now():
    def make(rows: int) -> Mixture:
        return Mixture({"a": Stream([np.arange(rows)] * 2)}, {"a": 1}, batch_size=3, num_batches=9)

    loader, again = make(8), make(2)
    next(iter(loader))
    with pytest.raises(ChangedBatchesError, match="of which 3 rows were used"):
        again.set_state(loader.get_state())
    assert next(iter(again)).tolist() == [0, 1, 0]


class Closes:
    """An iterable that tells when what iterates it was closed."""

    open = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        self.open += 1
        try:
            for index in range(4):
                yield np.arange(3) + index
        finally:
            self.open -= 1


def test_loaders_that_a_mixture_made_are_closed_and_others_stay_where_they_are():
    made, own = Closes(), Closes()
    loaders = {"made": made, "own": Stream(own), "rows": ArrayLoader(np.arange(9), 3)}
    loader = Mixture(loaders, dict.fromkeys(loaders, 1), num_batches=3)
    next(iter(loader))
    assert (made.open, own.open) == (1, 1)
    loader.peek()
    rows = loaders["rows"].get_state()
    with data.closing_made((loader, loader)):
        pass
    assert (made.open, own.open) == (0, 1)
    assert loaders["rows"].get_state() == rows
    # What was looked at is still to come, but for what the closed one had begun.
    assert [batch[2] for batch in loader] == [1, 2, 3]


def test_mixture_that_made_nothing_keeps_its_place_when_a_run_closes():
    loader, same = pair(), pair()
    loader.peek()
    with data.closing_made((loader, loader)):
        pass
    assert_batches_equal(list(loader), list(same))


class Regression(distaff.TrainerModule):
    def print_tabulate(self, example_batch):
        pass

    def loss_fn(self, params, batch, ctx):
        loss = jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])
        if "source" not in batch:
            return loss
        return loss, {"b": metrics.Mean.per_example(loss, weight=batch["source"] == 1)}


class Stop(distaff.Callback):
    """Ends a run at a step, or at the first checkpoint from there on, as Ctrl-C would."""

    def __init__(self, event: str, step: int) -> None:
        self.event, self.step = event, step

    def on_step_end(self, info):
        self.end("step", info)

    def on_checkpoint(self, info):
        self.end("checkpoint", info)

    def end(self, event: str, info: Any) -> None:
        if event == self.event and info.step >= self.step:
            raise KeyboardInterrupt


def pairs(seed: int, rows: int) -> dict[str, np.ndarray]:
    x = np.random.default_rng(seed).normal(size=(rows, 3)).astype(np.float32)
    return {"x": x, "y": x.sum(1)}


def shuffled(**options: Any) -> Mixture:
    loaders = {"a": ArrayLoader(pairs(0, 50), 6, shuffle=True)}
    loaders["b"] = ArrayLoader(pairs(1, 9), 4, shuffle=True, seed=1)
    return Mixture(loaders, {"a": 0.6, "b": 0.4}, batch_size=5, **options)


def endless() -> Mixture:
    batches = [
        jax.tree.map(lambda leaf, i=i: leaf[4 * i : 4 * i + 4], pairs(1, 40)) for i in range(9)
    ]
    loaders = {"a": ArrayLoader(pairs(0, 50), 6, shuffle=True), "b": lambda: iter(batches)}
    return Mixture(loaders, {"a": 0.6, "b": 0.4}, batch_size=5)


def trained(make: Callable[[], Mixture], *callbacks: Any, epochs: int = 3, **options: Any) -> Any:
    options = {"root": None, "enable_progress_bar": False, "steps_per_call": 4, **options}
    loop = {"steps_per_epoch": options.pop("steps_per_epoch", None)}
    fit = Regression(nn.Dense(1), optimizer=optax.adam(0.1), callbacks=callbacks, **options)
    fit.train_model(make(), num_epochs=epochs, **loop)
    return fit


def assert_same(one: Any, two: Any) -> None:
    for left, right in zip(
        jax.tree.leaves(one.state.params), jax.tree.leaves(two.state.params), strict=True
    ):
        assert left.tobytes() == right.tobytes()


@pytest.mark.parametrize(
    ("make", "event", "step", "options"),
    [
        (shuffled, "checkpoint", 10, {}),
        (shuffled, "step", 17, {"save_every": 1e-9}),
        (lambda: shuffled(with_source=True), "step", 14, {}),
        (endless, "step", 17, {"save_every": 1e-9, "steps_per_epoch": 8}),
        (endless, "checkpoint", 7, {"limit_batches": 7}),
        (shuffled, "checkpoint", 7, {"limit_batches": 7}),
    ],
)
@pytest.mark.slow
def test_run_that_was_interrupted_goes_on_bit_for_bit(make, event, step, options):
    clean = trained(make, **options)
    kept = {**options, "root": "runs", "name": "mix"}
    with pytest.raises(KeyboardInterrupt):
        trained(make, Stop(event, step), **kept)
    assert_same(trained(make, Stop(event, 10**9), resume="must", **kept), clean)


def test_run_goes_back_in_a_mixture_and_leaves_batches_out():
    def make(x: np.ndarray) -> Mixture:
        loaders = {"a": ArrayLoader({**pairs(0, 60), "x": x}, 6), "b": ArrayLoader(pairs(1, 9), 4)}
        return Mixture(loaders, {"a": 0.5, "b": 0.5}, batch_size=6, num_batches=19)

    x = pairs(0, 60)["x"]
    x[45] = np.nan
    back = trained(lambda: make(x), epochs=1, on_bad_numbers="rollback", on_bad_input="warn")
    ((_, start, stop, _),) = back.last_run.state.skipped
    assert start <= 15 < stop  # the row is one of batch 15
    assert back.step == 19 - (min(stop, 19) - start)
    assert jnp.isfinite(back.state.params["kernel"]).all()


def test_overfitting_trains_on_the_same_rows_and_gives_them_back():
    loader, same = shuffled(), shuffled()
    fit = trained(lambda: loader, epochs=4, overfit_batches=2)
    assert fit.step == 8
    assert_batches_equal(list(loader), list(same))

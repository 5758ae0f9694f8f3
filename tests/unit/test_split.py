"""Splits and folds of arrays, against scikit-learn's own."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import model_selection

from distaff import data
from distaff.errors import BatchError, ConfigError, MissingExtraError

ROWS = np.arange(97)
RNG = np.random.default_rng(0)
CLASSES = RNG.choice(["a", "b", "c"], p=[0.7, 0.2, 0.1], size=97)
GROUPS = RNG.integers(0, 20, size=97)


def lengths(parts: Any) -> list[int]:
    return [len(part) for part in parts]


@given(
    count=st.integers(20, 200),
    weights=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_each_row_is_in_one_part_and_sizes_are_the_nearest(count, weights, seed):
    rows = np.arange(count)
    fractions = [weight / sum(weights) for weight in weights]
    sizes = lengths(parts := data.split(rows, fractions, seed=seed))
    assert sorted(np.concatenate(parts).tolist()) == rows.tolist()
    assert all(abs(size - count * each) < 1 for size, each in zip(sizes, fractions, strict=True))
    assert all((np.diff(part) > 0).all() for part in parts)


def test_sizes_may_be_numbers_of_rows():
    assert lengths(data.split(ROWS, (90, 7))) == [90, 7]
    assert lengths(data.split(np.arange(10), (0.7, 0.3))) == [7, 3]
    assert lengths(data.split(np.arange(10), (0.1, 0.2, 0.7))) == [1, 2, 7]


def test_split_is_a_function_of_the_seed():
    first, again, other = (data.split(ROWS, (0.5, 0.5), seed=seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_all_arrays_are_split_alike():
    arrays = ({"a": ROWS, "b": np.stack([ROWS, ROWS], axis=1)}, 2 * ROWS)
    for inputs, labels in data.split(arrays, (0.8, 0.1, 0.1)):
        np.testing.assert_array_equal(inputs["b"][:, 1], inputs["a"])
        np.testing.assert_array_equal(labels, 2 * inputs["a"])
    (train, test) = data.split({"x": ROWS, "y": ROWS}, (0.8, 0.2))
    assert train.keys() == test.keys() == {"x", "y"}


@pytest.mark.parametrize("seed", range(5))
def test_stratified_split_has_the_class_counts_of_scikit_learn(seed):
    ours = data.split((ROWS, CLASSES == "a"), (77, 20), seed=seed, stratify=CLASSES)
    splitter = model_selection.StratifiedShuffleSplit(1, test_size=20, random_state=seed)
    theirs = next(splitter.split(ROWS, CLASSES))
    for (rows, _), other in zip(ours, theirs, strict=True):
        assert len(rows) == len(other)
        assert Counter(CLASSES[rows]) == Counter(CLASSES[other])


def test_stratified_split_has_exact_sizes_in_three_parts():
    parts = data.split(ROWS, (0.6, 0.2, 0.2), stratify=CLASSES)
    assert lengths(parts) == [58, 20, 19]
    assert sorted(np.concatenate(parts).tolist()) == ROWS.tolist()
    for part in parts:
        for name, count in Counter(CLASSES).items():
            assert abs(Counter(CLASSES[part])[name] - count * len(part) / 97) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_group_is_in_one_part(seed):
    parts = data.split(ROWS, (0.7, 0.3), seed=seed, groups=GROUPS)
    assert sorted(np.concatenate(parts).tolist()) == ROWS.tolist()
    assert not {*GROUPS[parts[0]]} & {*GROUPS[parts[1]]}
    assert abs(len(parts[0]) - 0.7 * 97) <= np.bincount(GROUPS).max()


def test_groups_of_one_example_give_exact_sizes():
    assert lengths(data.split(ROWS, (0.8, 0.2), groups=ROWS)) == lengths(
        data.split(ROWS, (0.8, 0.2))
    )


@pytest.mark.parametrize(
    ("arguments", "options", "error", "complaint"),
    [
        ((ROWS, (0.8, 0.3)), {}, ConfigError, r"add up to 1.*got \(0.8, 0.3\)"),
        ((ROWS, (0.8, -0.2, 0.4)), {}, ConfigError, "positive fractions"),
        ((ROWS, (90, 8)), {}, ConfigError, "add up to 97"),
        ((ROWS, ()), {}, ConfigError, "parts must be"),
        ((ROWS, 0.8), {}, ConfigError, r"parts must be.*got \(0\.8,\)"),
        ((ROWS[:3], (0.9, 0.1)), {}, BatchError, r"examples have \[3, 0\]"),
        ((ROWS, (0.8, 0.2)), {"seed": -1}, ConfigError, "seed must be"),
        (
            (ROWS, (0.8, 0.2)),
            {"stratify": CLASSES[:5]},
            BatchError,
            r"stratify must have one.*\(5,",
        ),
        ((ROWS, (0.8, 0.2)), {"stratify": ROWS}, BatchError, "the smallest has 1"),
        ((ROWS, (0.8, 0.2)), {"groups": 0 * ROWS}, BatchError, r"the 1 groups.*\[1, 0\]"),
        (
            (ROWS, (0.8, 0.2)),
            {"groups": ROWS, "stratify": CLASSES},
            ConfigError,
            "not both.*use k_fold",
        ),
        (([ROWS], (0.8, 0.2)), {}, BatchError, "Only whole arrays.*got a list"),
        (((ROWS, ROWS[:9]), (0.8, 0.2)), {}, BatchError, "arrays of the given data"),
    ],
)
def test_wrong_split_is_an_error(arguments, options, error, complaint):
    with pytest.raises(error, match=complaint):
        data.split(*arguments, **options)


SPLITTERS = {
    "plain": (model_selection.KFold, {}),
    "stratified": (model_selection.StratifiedKFold, {"stratify": CLASSES}),
    "grouped": (model_selection.GroupKFold, {"groups": GROUPS}),
    "both": (model_selection.StratifiedGroupKFold, {"stratify": CLASSES, "groups": GROUPS}),
}


@pytest.mark.parametrize("name", SPLITTERS)
def test_folds_are_those_of_scikit_learn(name):
    splitter, options = SPLITTERS[name]
    ours = list(data.k_fold((ROWS, CLASSES == "a"), 4, seed=3, **options))
    theirs = splitter(4, shuffle=True, random_state=3).split(
        ROWS, options.get("stratify"), options.get("groups")
    )
    for ((train, _), (val, _)), (train_rows, val_rows) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(train, train_rows)
        np.testing.assert_array_equal(val, val_rows)
    assert sorted(np.concatenate([val for _, (val, _) in ours]).tolist()) == ROWS.tolist()


@pytest.mark.parametrize(
    ("k", "options", "error", "complaint"),
    [
        (1, {}, ConfigError, "k must be an integer, at least 2; got 1"),
        (98, {}, BatchError, "97 examples cannot make 98 folds"),
        (21, {"groups": GROUPS}, BatchError, "cannot make 21 folds.*groups"),
        (3, {"stratify": CLASSES[1:]}, BatchError, "stratify must have one value"),
    ],
)
def test_wrong_folds_are_an_error_at_the_call(k, options, error, complaint):
    with pytest.raises(error, match=complaint):
        data.k_fold(ROWS, k, **options)


def test_folds_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "distaff.integrations.sklearn", None)
    monkeypatch.delitem(sys.modules, "distaff.integrations.sklearn")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match=r"distaff\[folds\]"):
        data.k_fold(ROWS, 4)


def test_parts_of_jax_arrays_are_numpy_arrays():
    (first, _) = data.split(jax.numpy.arange(10), (0.5, 0.5))
    assert type(first) is np.ndarray


def test_wrong_calls_name_the_arguments():
    with pytest.raises(ConfigError, match=r"split: too many positional arguments\. Its"):
        data.split(ROWS, ROWS, (0.8, 0.2))
    with pytest.raises(ConfigError, match=r"no argument 'test_size'\. Write parts=\(0"):
        data.split(ROWS, test_size=0.2)
    with pytest.raises(ConfigError, match=r"k_fold has no argument 'n_splits'\. Write k"):
        data.k_fold(ROWS, n_splits=3)

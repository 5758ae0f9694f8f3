"""The last values that were made."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from time import sleep

import pytest

from distaff.data.examples.block_cache import Kept


def test_kept_forgets_the_oldest():
    made = []

    def make(key: int) -> str:
        made.append(key)
        return str(key)

    kept = Kept(2)
    assert [kept.get(key, make) for key in (1, 2, 1, 3, 2, 1)] == ["1", "2", "1", "3", "2", "1"]
    assert made == [1, 2, 3, 1]


def test_kept_makes_a_value_once_for_many_threads():
    barrier, made = Barrier(4), []

    def make(key: int) -> object:
        sleep(0.001)  # in which other threads ask for it
        made.append(key)
        return object()

    def get(key: int) -> object:
        barrier.wait()
        return kept.get(key, make)

    kept = Kept(50)
    with ThreadPoolExecutor(4) as pool:
        values = list(pool.map(get, [key for key in range(50) for _ in range(4)]))
    assert sorted(made) == list(range(50))
    assert len(set(values)) == 50


def test_kept_has_nothing_of_what_could_not_be_made():
    def fail(key: int) -> str:
        raise OSError(key)

    kept = Kept(1)
    with pytest.raises(OSError, match="1"):
        kept.get(1, fail)
    assert kept.get(1, str) == "1"

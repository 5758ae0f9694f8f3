"""The warning of the allocator: only where page faults were measured, and once in a process."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterator
from typing import Any

import pytest

from distaff.execution import allocator, page_faults
from distaff.execution.feed.chunk import Chunk
from distaff.execution.page_faults import Usage, watched

CHUNK: Any = Chunk(4, 8, None)  # nobody looks at its batches


@pytest.fixture(autouse=True)
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "is_late", lambda: True)
    monkeypatch.setattr(page_faults, "_said", [])


def used(kernel: float, faults: int, *, seconds: float = 0.1) -> Iterator[Usage]:
    """Yields what a process has used after each chunk: a share of the time in the kernel."""
    for number in range(100):
        now = number * seconds
        yield Usage((1 - kernel) * now, kernel * now, number * faults)


def warnings_of(caplog: Any, usage: Iterator[Usage], epochs: int = 1) -> list[str]:
    with caplog.at_level(logging.WARNING):
        for _ in range(epochs):
            chunks = watched(iter([CHUNK] * 20), True, lambda: next(usage))
            assert list(chunks) == [CHUNK] * 20
    return [record.getMessage() for record in caplog.records]


def test_slow_steps_are_warned_of_once_with_what_was_measured(caplog):
    (text,) = warnings_of(caplog, used(0.25, 40_000), epochs=3)
    assert "takes 25 % of the processor time" in text
    assert "(10,000 per step)" in text
    assert "Call distaff.execution.allocator.tune() before" in text


@pytest.mark.parametrize(("kernel", "faults"), [(0.05, 40_000), (0.5, 3_000)])
def test_steps_that_are_not_slowed_by_page_faults_are_not_warned_of(caplog, kernel, faults):
    assert warnings_of(caplog, used(kernel, faults)) == []


def test_short_steps_are_measured_for_long_enough_or_not_at_all(caplog):
    assert warnings_of(caplog, used(0.25, 40_000, seconds=0.01)) == []


def test_nothing_is_measured_where_the_allocator_was_tuned_or_left_alone(monkeypatch):
    chunks = iter([CHUNK])
    assert watched(chunks, False) is chunks
    monkeypatch.setattr(allocator, "is_late", lambda: False)
    assert watched(chunks, True) is chunks


def test_usage_of_this_process_only_grows():
    before = page_faults._usage()
    with mmap.mmap(-1, 2**20) as pages:
        pages.write(bytes(2**20))
    after = page_faults._usage()
    assert after.user + after.kernel >= before.user + before.kernel
    assert after.faults > before.faults

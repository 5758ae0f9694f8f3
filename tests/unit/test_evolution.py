"""Which members are replaced by which, and with what values."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distaff.tune import Float
from distaff.tune.evolution.rules import Evolution

RATE, DECAY = "optimizer.learning_rate", "optimizer.weight_decay"
SPACE = {RATE: Float(1e-4, 1e-1, log=True), DECAY: Float(0.0, 0.2)}
SCORES = st.lists(st.none() | st.floats(-10, 10), min_size=2, max_size=12)


def evolution(**changes: Any) -> Evolution:
    return Evolution(**{"space": SPACE, "every": 1, "fraction": 0.25, "seed": 3, **changes})


@given(SCORES, st.sampled_from([0.1, 0.25, 0.5]), st.integers(1, 5))
def test_the_worst_continue_from_the_best(scores, fraction: float, epoch: int) -> None:
    one = evolution(fraction=fraction)
    values = one.initial(len(scores))
    sources, after = one.next(values, scores, epoch)
    alive = [score for score in scores if score is not None]
    count = max(1, int(fraction * len(scores)))
    for n, source in enumerate(sources):
        if source == n:
            assert after[n] == values[n]
            assert scores[n] is not None or not alive
            continue
        assert scores[source] is not None
        assert sources[source] == source  # a parent is not replaced itself
        assert sum(score > scores[source] for score in alive) < count
        if scores[n] is not None:
            assert scores[n] <= scores[source]
            assert sum(score < scores[n] for score in alive) < count
    assert one.next(values, scores, epoch) == (sources, after)  # a resume repeats it


def test_a_member_takes_over_perturbed_values_within_their_range() -> None:
    one = evolution(fraction=0.5)
    kinds = set()
    for epoch in range(1, 200):
        values = [{RATE: 0.09, DECAY: 0.19}, {RATE: 1e-3, DECAY: 0.0}]
        sources, after = one.next(values, [1.0, 0.0], epoch)
        assert sources == [0, 0]
        assert after[0] == values[0]
        assert 1e-4 <= after[1][RATE] <= 1e-1
        assert 0 <= after[1][DECAY] <= 0.2
        ratio = after[1][RATE] / 0.09
        kinds.add(next((x for x in (0.8, 1 / 0.9) if math.isclose(ratio, x)), "drawn"))
    assert kinds == {0.8, 1 / 0.9, "drawn"}  # 1.25 is cut off at the end of the range


def test_first_values_cover_the_range_on_its_scale() -> None:
    values = [each[RATE] for each in evolution().initial(500)]
    assert min(values) < 2e-4
    assert max(values) > 5e-2
    assert 0.4 < sum(value < math.sqrt(1e-5) for value in values) / 500 < 0.6
    assert evolution(seed=4).initial(3) != evolution().initial(3) == evolution().initial(3)


@pytest.mark.parametrize("every", [1, 3])
def test_members_are_replaced_every_few_epochs(every: int) -> None:
    due = [epoch for epoch in range(1, 10) if evolution(every=every).is_due(epoch)]
    assert due == list(range(every, 10, every))

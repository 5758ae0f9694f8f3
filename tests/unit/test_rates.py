"""Learning rates for the log: those of the schedule, computed a block ahead."""

from __future__ import annotations

import numpy as np
import optax
import pytest

from distaff.optim import rates
from distaff.optim.rates import make_rates


@pytest.mark.parametrize(
    "schedule",
    [optax.constant_schedule(0.1), optax.warmup_cosine_decay_schedule(0.0, 1.0, 5, 40)],
)
def test_rates_are_those_of_the_schedule(monkeypatch, schedule):
    monkeypatch.setattr(rates, "_BLOCK", 8)
    rate = make_rates(schedule)
    for step in (0, 1, 6, 7, 8, 15, 16, 39, 3):
        assert rate(step) == pytest.approx(float(schedule(step)), rel=1e-6, abs=1e-9)


def test_next_block_is_asked_for_before_it_is_wanted(monkeypatch):
    monkeypatch.setattr(rates, "_BLOCK", 8)
    asked = []
    rate = make_rates(optax.linear_schedule(1.0, 0.0, 64))
    compute = rate._compute
    rate._compute = lambda block: asked.append(int(block)) or compute(block)
    assert rate(7) == pytest.approx(1 - 7 / 64)
    assert asked == []
    assert rate(8) == pytest.approx(1 - 8 / 64)
    assert asked == [2]
    assert list(rate._blocks) == [1, 2]
    assert np.shape(rate._blocks[1]) == (8,)

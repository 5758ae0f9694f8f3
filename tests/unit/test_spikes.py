"""Spikes: outliers are seen, noise and drift are not, and units do not matter."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.errors import ConfigError
from distaff.spikes import SpikeDetector

# Whole numbers: shifts and powers of two are exact.
series = st.lists(st.integers(-1000, 1000), min_size=60, max_size=200)
seeds = st.integers(0, 2**32 - 1)


def spikes(losses, **options):
    is_spike = SpikeDetector(**options)
    return [index for index, loss in enumerate(losses) if is_spike(float(loss))]


@settings(deadline=None)
@given(series, st.integers(-500, 500), st.integers(-8, 8), st.floats(0.5, 4.0))
def test_spikes_depend_on_neither_level_nor_scale(losses, shift, exponent, threshold):
    moved = [(loss + shift) * 2.0**exponent for loss in losses]
    assert spikes(moved, threshold=threshold) == spikes(losses, threshold=threshold)


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.integers(33, 300))
def test_constant_losses_never_spike(loss, length):
    assert spikes([loss] * length) == []


def test_rounding_is_no_spike():
    assert spikes([1.0] * 100 + [1.0 + float(np.finfo(np.float32).eps)]) == []


@settings(deadline=None, max_examples=50)
@given(seeds, st.integers(40, 299))
def test_one_outlier_is_the_one_spike(seed, place):
    losses = np.random.default_rng(seed).uniform(2.0, 3.0, 300)
    losses[place] = 12.0
    assert spikes(losses) == [place]


@settings(deadline=None, max_examples=50)
@given(seeds, st.floats(-0.1, 0.1), st.sampled_from([32, 128]))
def test_drift_is_no_spike(seed, slope, window):
    losses = slope * np.arange(500.0) + np.random.default_rng(seed).uniform(0.0, 1.0, 500)
    assert spikes(losses, window=window) == []


def test_fall_and_long_plateau_are_no_spikes():
    rng = np.random.default_rng(0)
    losses = 6.0 * np.exp(-np.arange(2000) / 100.0) + 1.0 + 0.05 * rng.normal(size=2000)
    assert spikes(losses) == []


def test_second_outlier_is_seen_after_the_first():
    losses = np.random.default_rng(0).uniform(2.0, 3.0, 300)
    losses[[200, 203, 210, 230]] = 40.0
    assert spikes(losses) == [200, 203, 210, 230]


def test_half_of_the_losses_equal_falls_back_on_the_mean():
    losses = np.zeros(200)
    losses[::5] = 0.1
    losses[150] = 5.0
    assert spikes(losses) == [150]


def test_new_level_is_learned():
    noise = np.random.default_rng(0).uniform(0.0, 1.0, 600)
    found = spikes(noise + np.where(np.arange(600) < 300, 0.0, 50.0))
    assert found[0] == 300
    assert found[-1] < 300 + 128


def test_warm_up_is_silent_and_then_ends():
    losses = [1.0, 2.0] * 4 + [100.0]
    assert spikes(losses, warm_up=8, window=8) == [8]
    assert spikes(losses, warm_up=16, window=16) == []


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_loss_that_is_not_finite_is_a_spike_and_is_forgotten(loss):
    assert spikes([loss, *([1.0, 2.0] * 50), loss, 1.0, 100.0]) == [0, 101, 103]


@pytest.mark.parametrize(
    "options", [{"threshold": 0.0}, {"threshold": math.nan}, {"warm_up": 7}, {"window": 31}]
)
def test_detector_refuses_what_is_out_of_range(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        SpikeDetector(**options)


def test_outlier_is_seen_far_above_zero():
    assert spikes([*([1000.0, 1001.0] * 50), 1020.0]) == [100]

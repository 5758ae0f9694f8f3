"""Spikes: outliers are seen, noise and drift are not, and units do not matter."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.step.outliers import WARM_UP, WINDOW, is_spike, no_losses, remembered

LENGTH = 600

# Whole numbers: shifts and powers of two are exact.
series = st.lists(st.integers(-1000, 1000), min_size=60, max_size=200)
seeds = st.integers(0, 2**32 - 1)


@functools.cache
def program(threshold):
    def step(losses, loss):
        return remembered(losses, loss, threshold), is_spike(losses, loss)

    return jax.jit(lambda series: jax.lax.scan(step, no_losses(), series)[1])


def spikes(losses, threshold=8.0):
    padded = np.full(LENGTH, np.nan, np.float32)  # what is not finite is no spike
    padded[: len(losses)] = losses
    return np.flatnonzero(program(threshold)(padded)).tolist()


def reference(losses, threshold=8.0):
    """The same rule, with NumPy and in float64; the limit is renewed every eighth loss."""
    found, known, limit = [], [], math.inf
    for index, loss in enumerate(losses):
        if not math.isfinite(loss):
            continue
        found += [index] * bool(loss > limit)
        known.append(loss)
        if len(known) >= WARM_UP and len(known) % 8 == 0:
            recent = np.array(known[-WINDOW:])
            median = np.median(recent)
            distances = np.abs(recent - median)
            sigma = 1.4826 * np.median(distances) or 1.2533 * np.mean(distances)
            floor = 4 * float(np.finfo(np.float32).eps) * abs(median)
            limit = median + threshold * max(sigma, floor)
    return found


@settings(deadline=None, max_examples=30)
@given(seeds, st.sampled_from([2.0, 8.0]))
def test_spikes_are_those_of_the_published_rule(seed, threshold):
    rng = np.random.default_rng(seed)
    losses = rng.normal(size=300).round(3) * np.where(rng.random(300) < 0.05, 30.0, 1.0) + 50.0
    losses[rng.integers(0, 300, 3)] = np.nan
    losses = losses.astype(np.float32).tolist()
    assert spikes(losses, threshold) == reference(losses, threshold)


@settings(deadline=None)
@given(series, st.integers(-500, 500), st.integers(-8, 8), st.sampled_from([0.5, 4.0]))
def test_spikes_depend_on_neither_level_nor_scale(losses, shift, exponent, threshold):
    moved = [(loss + shift) * 2.0**exponent for loss in losses]
    assert spikes(moved, threshold) == spikes(losses, threshold)


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
@given(seeds, st.floats(-0.1, 0.1))
def test_drift_is_no_spike(seed, slope):
    losses = slope * np.arange(500.0) + np.random.default_rng(seed).uniform(0.0, 1.0, 500)
    assert spikes(losses) == []


def test_fall_and_long_plateau_are_no_spikes():
    rng = np.random.default_rng(0)
    losses = 6.0 * np.exp(-np.arange(600) / 50.0) + 1.0 + 0.05 * rng.normal(size=600)
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
    assert found[-1] < 300 + WINDOW


def test_warm_up_is_silent_and_then_ends():
    assert spikes([*([1.0, 2.0] * 16), 100.0]) == [WARM_UP]
    assert spikes([*([1.0, 2.0] * 15), 1.0, 100.0]) == []


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_loss_that_is_not_finite_is_forgotten(loss):
    assert spikes([loss, *([1.0, 2.0] * 50), loss, 1.0, 100.0]) == [103]


def test_outlier_is_seen_far_above_zero():
    assert spikes([*([1000.0, 1001.0] * 50), 1020.0]) == [100]


def test_one_more_loss_costs_a_fixed_room():
    losses = remembered(no_losses(), jnp.float32(1.0), 8.0)
    assert (losses.recent.shape, int(losses.count)) == ((WINDOW,), 1)

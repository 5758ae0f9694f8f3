from __future__ import annotations

import math

import numpy as np
import pytest

from distaff.zoo import GaussianRing

RING = GaussianRing(modes=8, radius=2.0, sigma=0.05)


def measured(points) -> dict[str, float]:
    return {
        name: float(value) for name, value in RING.coverage(np.asarray(points, np.float32)).items()
    }


@pytest.mark.parametrize("modes", [3, 8])
def test_gaussian_ring_has_its_centres_evenly_on_the_circle(modes):
    centres = GaussianRing(modes=modes, radius=1.5).centres
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1.5, rtol=1e-6)
    apart = np.linalg.norm(centres - np.roll(centres, 1, axis=0), axis=1)
    np.testing.assert_allclose(apart, 3 * math.sin(math.pi / modes), rtol=1e-5)


def test_gaussian_ring_samples_the_mixture():
    points = RING.sample(40_000, seed=0)
    assert points.dtype == np.float32
    near = np.linalg.norm(points[:, None] - RING.centres[None], axis=-1).argmin(axis=1)
    np.testing.assert_allclose(np.bincount(near) / 40_000, 1 / 8, atol=0.006)
    offsets = points - RING.centres[near]
    np.testing.assert_allclose(offsets.std(axis=0), 0.05, rtol=0.02)
    np.testing.assert_allclose(offsets.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_array_equal(RING.sample(10, 5), RING.sample(10, np.random.default_rng(5)))
    assert not np.array_equal(RING.sample(10, 5), RING.sample(10, 6))


def test_gaussian_ring_covers_itself():
    found = measured(RING.sample(40_000, seed=1))
    assert found["modes"] == 8
    assert found["good"] == pytest.approx(1 - math.exp(-4.5), abs=0.002)
    assert 0.115 < found["rarest_mode"] < 0.125


def test_gaussian_ring_counts_modes_by_a_quarter_of_their_share():
    # 96 points: a fair share is 12, a quarter of it 3.
    counts = [81, 3, 2, 3, 3, 2, 1, 1]
    points = np.repeat(RING.centres, counts, axis=0)
    assert measured(points) == {"modes": 4, "good": 1, "rarest_mode": pytest.approx(1 / 96)}


def test_gaussian_ring_takes_points_within_three_sigma_for_good():
    inside, outside = (RING.centres * (1 + 3 * 0.05 / 2 * factor) for factor in (0.99, 1.01))
    assert measured(inside) == {"modes": 8, "good": 1, "rarest_mode": 0.125}
    assert measured(outside) == {"modes": 0, "good": 0, "rarest_mode": 0}
    half = np.concatenate([inside[:4], outside[4:]])
    assert measured(half) == {"modes": 4, "good": 0.5, "rarest_mode": 0}

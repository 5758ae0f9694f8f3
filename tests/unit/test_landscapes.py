from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.errors import ConfigError
from distaff.tune.landscapes import (
    ACKLEY,
    BOOTH,
    BRANIN,
    LANDSCAPES,
    MATYAS,
    MICHALEWICZ,
    ROSENBROCK,
    SCHWEFEL,
    STYBLINSKI_TANG,
    descend,
)

ALL = pytest.mark.parametrize("landscape", LANDSCAPES, ids=lambda landscape: landscape.name)
CASES = [
    (landscape, num_dims)
    for landscape in LANDSCAPES
    for num_dims in (1, 2, 10)
    if landscape.num_dims[0] <= num_dims <= (landscape.num_dims[1] or num_dims)
]
IN_DIMS = pytest.mark.parametrize(
    ("landscape", "num_dims"), CASES, ids=[f"{case.name}-{n}" for case, n in CASES]
)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@functools.partial(jax.jit, static_argnums=0)
def values(landscape, x):
    return landscape(x)


@functools.partial(jax.jit, static_argnums=0)
def gradients(landscape, x):
    return jax.vmap(jax.grad(landscape))(x)


def loops(name: str, x: list[float]) -> float:
    """The published formulas, written out a second time, number by number."""
    n, pi = len(x), math.pi
    a, b = x[0], x[-1]
    indexed = list(enumerate(x, start=1))
    match name:
        case "Ackley":
            root = math.sqrt(sum(c * c for c in x) / n)
            mean_cosine = sum(math.cos(2 * pi * c) for c in x) / n
            return 20 + math.e - 20 * math.exp(-0.2 * root) - math.exp(mean_cosine)
        case "Rastrigin":
            return 10 * n + sum(c * c - 10 * math.cos(2 * pi * c) for c in x)
        case "Griewank":
            product = math.prod(math.cos(c / math.sqrt(i)) for i, c in indexed)
            return 1 + sum(c * c for c in x) / 4000 - product
        case "Schwefel":
            return 418.9828872724339 * n - sum(c * math.sin(math.sqrt(abs(c))) for c in x)
        case "Matyas":
            return 0.26 * a * a + 0.26 * b * b - 0.48 * a * b
        case "Booth":
            return 5 * a * a + 5 * b * b + 8 * a * b - 34 * a - 38 * b + 74
        case "Michalewicz":
            return -sum(math.sin(c) * math.sin(i * c * c / pi) ** 20 for i, c in indexed)
        case "Styblinski-Tang":
            return 0.5 * sum(c**4 - 16 * c**2 + 5 * c for c in x)
        case "Rosenbrock":
            return float(scipy.optimize.rosen(x))
        case "Beale":
            targets = (1.5, 2.25, 2.625)
            return sum((t - a * (1 - b**k)) ** 2 for k, t in enumerate(targets, start=1))
        case "Branin":
            inner = b - 5.1 * a * a / (4 * pi * pi) + 5 * a / pi - 6
            return inner**2 + 10 * (1 - 1 / (8 * pi)) * math.cos(a) + 10
    raise AssertionError(name)


def points(landscape, num_dims, count, seed):
    low, high = landscape.bounds(num_dims)
    return np.random.default_rng(seed).uniform(low, high, (count, num_dims))


def test_the_eleven_are_there():
    assert len({landscape.name for landscape in LANDSCAPES}) == 11


@IN_DIMS
def test_value_at_the_minima_is_the_minimum(landscape, num_dims):
    minima = landscape.minima(num_dims)
    assert minima.shape == (len(minima), num_dims)
    low, high = landscape.bounds(num_dims)
    assert ((low <= minima) & (minima <= high)).all()
    np.testing.assert_allclose(values(landscape, minima), landscape.minimum(num_dims), atol=1e-11)


@IN_DIMS
@pytest.mark.slow
def test_gradient_vanishes_at_the_minima(landscape, num_dims):
    minima = landscape.minima(num_dims)
    np.testing.assert_allclose(gradients(landscape, minima), 0, atol=1e-9)


@ALL
def test_a_search_from_near_a_minimum_comes_back_to_it(landscape):
    for minimum in landscape.minima(2):
        found = scipy.optimize.minimize(
            lambda x: loops(landscape.name, x.tolist()),
            minimum + 1e-3,
            method="Nelder-Mead",
            tol=1e-9,
        )
        np.testing.assert_allclose(found.x, minimum, atol=1e-5)
        assert found.fun >= landscape.minimum(2) - 1e-11


@ALL
@given(data=st.data())
@settings(deadline=None, max_examples=20)
@pytest.mark.slow
def test_no_point_is_lower(landscape, data):
    most = landscape.num_dims[1] or 6
    num_dims = data.draw(st.integers(landscape.num_dims[0], min(most, 6)))
    low, high = landscape.bounds(num_dims)
    coordinates = [st.floats(*interval) for interval in zip(low, high, strict=True)]
    point = np.array(data.draw(st.tuples(*coordinates)))
    scale = 1 + abs(landscape.minimum(num_dims))
    assert values(landscape, point) >= landscape.minimum(num_dims) - 1e-12 * scale


@ALL
def test_no_point_of_a_grid_is_lower_and_the_lowest_is_near_a_minimum(landscape):
    low, high = landscape.bounds()
    axes = [np.linspace(start, end, 501) for start, end in zip(low, high, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    found = np.asarray(values(landscape, grid))
    assert found.shape == (501, 501)
    assert found.min() >= landscape.minimum(2) - 1e-11
    lowest = grid[np.unravel_index(found.argmin(), found.shape)]
    assert landscape.distance(lowest) <= 0.01 * np.linalg.norm(high - low)


@IN_DIMS
def test_values_are_those_of_the_published_formula(landscape, num_dims):
    sample = points(landscape, num_dims, count=7, seed=1)
    expected = [loops(landscape.name, point) for point in sample.tolist()]
    np.testing.assert_allclose(values(landscape, sample), expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(
    ("landscape", "point", "value"),
    [
        (ACKLEY, (1, 1), 3.6253849384403627),
        (BRANIN, (0, 0), 55.602112642270264),
        (MATYAS, (10, -10), 100.0),
        (ROSENBROCK, (0, 0, 0), 2.0),
        (SCHWEFEL, (0, 0), 837.9657745448674),
        (STYBLINSKI_TANG, (1, 1), -10.0),
    ],
)
def test_spot_values(landscape, point, value):
    np.testing.assert_allclose(values(landscape, np.array(point, float)), value, rtol=1e-12)


def test_published_minima_to_their_published_digits():
    for num_dims, value in ((2, -1.8013), (5, -4.687658), (10, -9.66015)):
        assert abs(MICHALEWICZ.minimum(num_dims) - value) < 5e-5
    np.testing.assert_allclose(MICHALEWICZ.minima(2), [[2.20, 1.57]], atol=5e-3)
    np.testing.assert_allclose(
        BRANIN.minima(2), [[-math.pi, 12.275], [math.pi, 2.275], [3 * math.pi, 2.475]], atol=1e-3
    )
    assert abs(BRANIN.minimum(2) - 0.397887) < 5e-7
    assert abs(STYBLINSKI_TANG.minimum(10) - -391.6616) < 1e-4


@ALL
def test_gradient_is_that_of_finite_differences_and_finite_at_the_corners(landscape):
    (point,) = points(landscape, 2, count=1, seed=2)
    expected = scipy.optimize.approx_fprime(point, lambda x: loops(landscape.name, x.tolist()))
    found = gradients(landscape, np.array([point, *landscape.bounds(), np.zeros(2)]))
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-4)
    assert np.isfinite(found).all()


@ALL
@pytest.mark.slow
def test_leading_axes_are_kept_and_so_is_the_dtype(landscape):
    x = jnp.asarray(points(landscape, 2, count=6, seed=3), jnp.float32).reshape(3, 2, 2)
    found = jax.jit(landscape)(x)
    assert found.shape == (3, 2)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[2, 1], landscape(x[2, 1]), rtol=1e-5)


def test_distance_is_to_the_nearest_minimum():
    x = BRANIN.minima(2)[[2, 0, 0]] + np.array([[3.0, 4.0], [0.0, 0.5], [math.nan, 0.0]])
    np.testing.assert_allclose(BRANIN.distance(x), [5.0, 0.5, math.inf])


@pytest.mark.parametrize(
    ("landscape", "num_dims", "message"),
    [
        (BRANIN, 3, "Branin has 2 coordinates; got 3"),
        (ROSENBROCK, 1, "Rosenbrock has at least 2 coordinates; got 1"),
        (MICHALEWICZ, 11, "Michalewicz has 1 to 10 coordinates; got 11"),
    ],
)
def test_other_numbers_of_coordinates_are_refused(landscape, num_dims, message):
    for call in (landscape, landscape.distance):
        with pytest.raises(ConfigError, match=message):
            call(np.zeros((4, num_dims)))
    with pytest.raises(ConfigError, match=message):
        landscape.bounds(num_dims)


def test_descend_steps_in_the_domain_scaled_to_a_unit_square():
    rate, start = 1e-5, jnp.array([-3.0, 4.0])
    way = descend(BRANIN, optax.sgd(rate), start, num_steps=2)
    low, high = BRANIN.bounds()
    expected = [np.asarray(start)]
    for _ in range(2):
        gradient = np.asarray(jax.grad(BRANIN)(jnp.asarray(expected[-1])))
        expected.append(expected[-1] - rate * gradient * (high - low) ** 2)
    np.testing.assert_allclose(way, expected, rtol=1e-12)


def test_descend_stays_in_the_domain():
    way = np.asarray(descend(BOOTH, optax.sgd(1.0), jnp.array([2.0, 2.0]), num_steps=5))
    low, high = BOOTH.bounds()
    assert ((low <= way) & (way <= high)).all()
    assert len(np.unique(way, axis=0)) > 1


@pytest.mark.slow
def test_descend_offers_the_function_and_runs_for_many_rates_and_starts_at_once():
    def end(rate, start):
        return descend(BOOTH, optax.lbfgs(rate), start, num_steps=20)[-1]

    rates, starts = jnp.array([0.5, 1.0]), jnp.array([[-5.0, 5.0], [9.0, -9.0], [0.0, 0.0]])
    ends = jax.jit(jax.vmap(jax.vmap(end, (None, 0)), (0, None)))(rates, starts)
    assert ends.shape == (2, 3, 2)
    assert (BOOTH.distance(ends) < 1e-3).all()

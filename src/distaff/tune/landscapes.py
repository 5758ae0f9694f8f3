"""Eleven classic test functions of optimization, with their domains and known global minima.

Definitions and minima: S. Surjanovic and D. Bingham, Virtual Library of Simulation Experiments,
https://www.sfu.ca/~ssurjano/optimization.html; M. Jamil and X.-S. Yang, A literature survey of
benchmark functions for global optimization problems, 2013, arXiv:1308.4008. Minima given there to a
few digits are refined here to float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from distaff.errors import ConfigError
from distaff.step.state import TrainState


def _zero(num_dims: int) -> float:
    return 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Landscape:
    """A function of `n` coordinates with its global minima. Calling it checks the shape.

    >>> float(BOOTH(jnp.array([1.0, 3.0])))
    0.0

    Args:
        name: common name of the function.
        function: `[..., n] -> [...]`, float, with a finite gradient in the whole domain.
        domain: interval of each coordinate, or a single one for all.
        minima: function from `n` to the positions of all global minima, float64 `[k, n]`.
        minimum: function from `n` to the value of the global minima.
        num_dims: smallest and largest `n`; None for no limit.
    """

    name: str
    function: Callable[[jax.Array], jax.Array]
    domain: tuple[tuple[float, float], ...]
    minima: Callable[[int], np.ndarray]
    minimum: Callable[[int], float] = _zero
    num_dims: tuple[int, int | None] = (1, None)

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Returns the value at each point.

        Args:
            x: points, float `[..., n]`.

        Returns:
            Values `[...]` with the dtype of `x`.

        Raises:
            ConfigError: the function is not defined for `n` coordinates.
        """
        self.check_dims(jnp.shape(x)[-1] if jnp.ndim(x) else 0)
        return self.function(jnp.asarray(x))

    def bounds(self, num_dims: int = 2) -> np.ndarray:
        """Returns the lower and upper bounds of the domain, float64 `[2, n]`.

        Raises:
            ConfigError: the function is not defined for `n` coordinates.
        """
        self.check_dims(num_dims)
        intervals = self.domain * num_dims if len(self.domain) == 1 else self.domain
        return np.array(intervals, float).T

    def distance(self, x: ArrayLike) -> np.ndarray:
        """Returns the distance of each point to the nearest global minimum.

        Args:
            x: points `[..., n]`.

        Returns:
            Euclidean distances `[...]`, float64; inf for points that are not finite.

        Raises:
            ConfigError: the function is not defined for `n` coordinates.
        """
        x = np.asarray(x, float)
        self.check_dims(x.shape[-1] if x.ndim else 0)
        minima = self.minima(x.shape[-1])
        distances = np.linalg.norm(x[..., None, :] - minima, axis=-1).min(axis=-1)
        return np.where(np.isfinite(distances), distances, np.inf)

    def check_dims(self, num_dims: int) -> None:
        """Checks a number of coordinates.

        Raises:
            ConfigError: the function is not defined for it.
        """
        fewest, most = self.num_dims
        if num_dims < fewest or (most is not None and num_dims > most):
            limits = f"{fewest} to {most}" if most else f"at least {fewest}"
            wanted = str(fewest) if fewest == most else limits
            raise ConfigError(f"{self.name} has {wanted} coordinates; got {num_dims}.")


def descend(
    landscape: Landscape, tx: optax.GradientTransformation, start: jax.Array, num_steps: int
) -> jax.Array:
    """Minimizes a landscape with an optimizer, and returns its path.

    The domain is scaled to the unit cube, so that learning rates are comparable between landscapes,
    and points outside are clipped to it. Works under `jax.jit` and `jax.vmap`, including over
    hyperparameters.

    Args:
        landscape: the function to minimize.
        tx: any Optax optimizer; it also receives the value, the gradient and the function.
        start: initial position, float `[n]`.
        num_steps: number of updates.

    Returns:
        Positions `[num_steps + 1, n]`, the first of which is `start`.
    """
    low, high = jnp.asarray(landscape.bounds(start.shape[-1]), start.dtype)

    def loss(point: jax.Array) -> jax.Array:
        return landscape(low + point * (high - low))

    def step(state: TrainState, _: None) -> tuple[TrainState, jax.Array]:
        value, grads = jax.value_and_grad(loss)(state.params)
        state = state.apply_gradients(grads=grads, value=value, value_fn=loss)
        state = state.replace(params=jnp.clip(state.params, 0, 1))
        return state, low + state.params * (high - low)

    state = TrainState.create(params=(start - low) / (high - low), tx=tx)
    _, path = jax.lax.scan(step, state, length=num_steps)
    return jnp.concatenate([start[None], path])


def _axes(x: jax.Array) -> jax.Array:
    """Returns the index of each coordinate, counted from 1, in the shape of `x`."""
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1).astype(x.dtype) + 1


def _root(squares: jax.Array) -> jax.Array:
    """Returns the square root, with gradient 0 at 0."""
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)


def _ackley(x: jax.Array) -> jax.Array:
    # The minimum is a cusp, where 0 is a subgradient.
    radius = _root(jnp.square(x).mean(axis=-1))
    waves = jnp.cos(2 * math.pi * x).mean(axis=-1)
    return -20 * jnp.expm1(-0.2 * radius) - (jnp.exp(waves) - math.e)


def _rastrigin(x: jax.Array) -> jax.Array:
    return (jnp.square(x) + 10 * (1 - jnp.cos(2 * math.pi * x))).sum(axis=-1)


def _griewank(x: jax.Array) -> jax.Array:
    waves = jnp.cos(x / jnp.sqrt(_axes(x))).prod(axis=-1)
    return jnp.square(x).sum(axis=-1) / 4000 - waves + 1


def _schwefel(x: jax.Array) -> jax.Array:
    return (_SCHWEFEL_VALUE - x * jnp.sin(_root(jnp.abs(x)))).sum(axis=-1)


def _matyas(x: jax.Array) -> jax.Array:
    a, b = x[..., 0], x[..., 1]
    return 0.26 * (a**2 + b**2) - 0.48 * a * b


def _booth(x: jax.Array) -> jax.Array:
    a, b = x[..., 0], x[..., 1]
    return (a + 2 * b - 7) ** 2 + (2 * a + b - 5) ** 2


def _michalewicz(x: jax.Array) -> jax.Array:
    return -(jnp.sin(x) * jnp.sin(_axes(x) * x**2 / math.pi) ** 20).sum(axis=-1)


def _styblinski_tang(x: jax.Array) -> jax.Array:
    return (x**4 - 16 * x**2 + 5 * x).sum(axis=-1) / 2


def _rosenbrock(x: jax.Array) -> jax.Array:
    a, b = x[..., :-1], x[..., 1:]
    return (100 * (b - a**2) ** 2 + (1 - a) ** 2).sum(axis=-1)


def _beale(x: jax.Array) -> jax.Array:
    a, b = x[..., 0], x[..., 1]
    return (1.5 - a + a * b) ** 2 + (2.25 - a + a * b**2) ** 2 + (2.625 - a + a * b**3) ** 2


def _branin_valley(a: float | jax.Array) -> float | jax.Array:
    return 5.1 / (4 * math.pi**2) * a**2 - 5 / math.pi * a + 6


def _branin(x: jax.Array) -> jax.Array:
    a, b = x[..., 0], x[..., 1]
    return (b - _branin_valley(a)) ** 2 + 10 * (1 - 1 / (8 * math.pi)) * jnp.cos(a) + 10


_SCHWEFEL_AT, _SCHWEFEL_VALUE = 420.9687463599821, 418.98288727243374
_STYBLINSKI_TANG_AT, _STYBLINSKI_TANG_VALUE = -2.903534027771177, -39.16616570377141
# Michalewicz is a sum of functions of one coordinate: their minima and values.
_MICHALEWICZ_AT = (
    *(2.2029055201726093, math.pi / 2, 1.2849915705529245, 1.9230584698663629, 1.7204697725658413),
    *(math.pi / 2, 1.454413971362379, 1.756086520945026, 1.6557174168210291, math.pi / 2),
)
_MICHALEWICZ_VALUES = (
    *(-0.8013034100985533, -1.0, -0.959091269896007, -0.9384624184720844, -0.9888010806215034),
    *(-1.0, -0.9932271353558825, -0.98287203627221, -0.9963943649251024, -1.0),
)


def _everywhere(coordinate: float) -> Callable[[int], np.ndarray]:
    """Returns the single minimum with equal coordinates."""
    return lambda num_dims: np.full((1, num_dims), coordinate)


def _at(*points: tuple[float, float]) -> Callable[[int], np.ndarray]:
    return lambda num_dims: np.array(points, float)


ACKLEY = Landscape(
    name="Ackley", function=_ackley, domain=((-32.768, 32.768),), minima=_everywhere(0.0)
)
RASTRIGIN = Landscape(
    name="Rastrigin", function=_rastrigin, domain=((-5.12, 5.12),), minima=_everywhere(0.0)
)
GRIEWANK = Landscape(
    name="Griewank", function=_griewank, domain=((-600.0, 600.0),), minima=_everywhere(0.0)
)
SCHWEFEL = Landscape(
    name="Schwefel", function=_schwefel, domain=((-500.0, 500.0),), minima=_everywhere(_SCHWEFEL_AT)
)
MATYAS = Landscape(
    name="Matyas", function=_matyas, domain=((-10.0, 10.0),), minima=_at((0, 0)), num_dims=(2, 2)
)
BOOTH = Landscape(
    name="Booth", function=_booth, domain=((-10.0, 10.0),), minima=_at((1, 3)), num_dims=(2, 2)
)
MICHALEWICZ = Landscape(
    name="Michalewicz",
    function=_michalewicz,
    domain=((0.0, math.pi),),
    minima=lambda num_dims: np.array([_MICHALEWICZ_AT[:num_dims]]),
    minimum=lambda num_dims: sum(_MICHALEWICZ_VALUES[:num_dims]),
    num_dims=(1, 10),
)
STYBLINSKI_TANG = Landscape(
    name="Styblinski-Tang",
    function=_styblinski_tang,
    domain=((-5.0, 5.0),),
    minima=_everywhere(_STYBLINSKI_TANG_AT),
    minimum=lambda num_dims: _STYBLINSKI_TANG_VALUE * num_dims,
)
ROSENBROCK = Landscape(
    name="Rosenbrock",
    function=_rosenbrock,
    domain=((-5.0, 10.0),),
    minima=_everywhere(1.0),
    num_dims=(2, None),
)
BEALE = Landscape(
    name="Beale", function=_beale, domain=((-4.5, 4.5),), minima=_at((3, 0.5)), num_dims=(2, 2)
)
BRANIN = Landscape(
    name="Branin",
    function=_branin,
    domain=((-5.0, 10.0), (0.0, 15.0)),
    minima=_at(*((a, float(_branin_valley(a))) for a in (-math.pi, math.pi, 3 * math.pi))),
    minimum=lambda num_dims: 5 / (4 * math.pi),
    num_dims=(2, 2),
)

LANDSCAPES = (
    *(ACKLEY, RASTRIGIN, GRIEWANK, SCHWEFEL, MATYAS, BOOTH),
    *(MICHALEWICZ, STYBLINSKI_TANG, ROSENBROCK, BEALE, BRANIN),
)
"""All eleven. Each is defined for two coordinates."""

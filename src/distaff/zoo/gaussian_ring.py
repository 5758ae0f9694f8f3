"""A ring of Gaussians, a test of mode collapse in generative models."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianRing:
    """A mixture of equally likely isotropic Gaussians in the plane, with centres on a circle.

    L. Metz et al., Unrolled Generative Adversarial Networks, ICLR 2017 (arXiv:1611.02163), use it
    to show mode collapse.

    Attributes:
        modes: number of Gaussians.
        radius: radius of the circle.
        sigma: standard deviation of each Gaussian along each axis.
    """

    modes: int = 8
    radius: float = 2.0
    sigma: float = 0.05

    @property
    def centres(self) -> np.ndarray:
        """The centres, float32 `[modes, 2]`."""
        angles = 2 * np.pi * np.arange(self.modes) / self.modes
        return (self.radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)).astype(np.float32)

    def sample(self, number: int, seed: int | np.random.Generator) -> np.ndarray:
        """Returns samples of the mixture, float32 `[number, 2]`.

        Args:
            number: number of samples.
            seed: a seed, or a generator, which it advances.
        """
        random = np.random.default_rng(seed)
        centres = self.centres[random.integers(self.modes, size=number)]
        return (centres + self.sigma * random.normal(size=(number, 2))).astype(np.float32)

    def coverage(self, points: jax.Array) -> dict[str, jax.Array]:
        """Returns how well points cover the mixture.

        A point is good within three standard deviations of a centre, as are 98.9 % of the mixture's
        own samples, `1 - exp(-9 / 2)`. A mode is covered if its good points are at least a quarter
        of its fair share, `1 / (4 * modes)` of all points: a few strays between two modes cover
        neither.

        Args:
            points: `[batch, 2]`, float.

        Returns:
            Float scalars: `modes`, the number of covered modes; `good`, the share of good points;
            `rarest_mode`, the share of all points that are good and belong to the rarest mode.
        """
        distances = jnp.linalg.norm(points[:, None] - self.centres[None], axis=-1)
        shares = (distances < 3 * self.sigma).mean(axis=0)
        covered = jnp.sum(4 * self.modes * shares >= 1, dtype=shares.dtype)
        return {"modes": covered, "good": shares.sum(), "rarest_mode": shares.min()}

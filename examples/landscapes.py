"""Optimizers on eleven classic test functions: how near they come to the known minimum.

    .venv/bin/python examples/landscapes.py --velo FOLDER

A learning rate is chosen from a grid by the lowest ends from 32 random points; the table is of 32
others: the median distance to the nearest global minimum, as a share of the domain's diagonal, and
how many end within 1 %. Picture: the ways from one point, `runs/landscapes/<version>/paths.png`.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import tyro

from distaff import OptimizerConfig
from distaff.integrations import matplotlib as figures
from distaff.integrations import matplotlib_optimizers
from distaff.optim import build_optimizer
from distaff.run.directory.run_directory import RunDirectory
from distaff.tune.landscapes import LANDSCAPES, descend

OPTIMIZERS = {
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "adam": optax.adam,
    "lion": optax.lion,
    "schedule-free": optax.contrib.schedule_free_adamw,
    "prodigy": optax.contrib.prodigy,
    "lbfgs": optax.lbfgs,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What can be set from the command line."""

    num_steps: int = 300
    velo: str | None = None  # the folder of its weights; without it, it is left out
    root: str = "runs"


def best_ways(landscape, make_optimizer, options):
    """Returns the ways `[starts / 2, steps + 1, 2]` of the second half, at the first one's rate."""
    starts = np.random.default_rng(0).uniform(*landscape.bounds(), (64, 2))

    def way(rate, start):
        return descend(landscape, make_optimizer(rate), start, options.num_steps)

    every_way = jax.jit(jax.vmap(jax.vmap(way, (None, 0)), (0, None)))
    first, second = np.split(np.asarray(every_way(np.logspace(-7, 0, 15), starts)), 2, axis=1)
    ends = np.nan_to_num(landscape(first[:, :, -1]), nan=np.inf)
    return second[np.median(ends, axis=1).argmin()]


def main(options: Options) -> dict[str, dict[str, np.ndarray]]:
    makers = dict(OPTIMIZERS)
    if options.velo:
        config = OptimizerConfig("velo", options={"weights": options.velo})
        makers["velo"] = lambda rate: build_optimizer(config, options.num_steps).tx
    print(f"{'':16}", *(f"{name:13}" for name in makers))
    paths = {}
    for landscape in LANDSCAPES:
        ways = {name: best_ways(landscape, maker, options) for name, maker in makers.items()}
        diagonal = np.linalg.norm(np.diff(landscape.bounds(), axis=0))
        ends = [landscape.distance(way[:, -1]) / diagonal for way in ways.values()]
        cells = (f"{np.median(end):<8.1g}{np.mean(end < 0.01):<5.0%}" for end in ends)
        print(f"{landscape.name:16}", *cells)
        paths[landscape.name] = {name: way[0] for name, way in ways.items()}
    directory = RunDirectory(options.root, "landscapes").create()
    figures.save(matplotlib_optimizers.optimizer_paths(LANDSCAPES, paths), directory / "paths.png")
    print(directory)
    return paths


if __name__ == "__main__":
    main(tyro.cli(Options))

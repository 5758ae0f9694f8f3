"""Nine optimizers, or ten, train one network on handwritten digits: learning curves and a table.

    .venv/bin/python examples/optimizer_shootout.py --velo FOLDER

Each learning rate is chosen by validation loss from one grid for all; then five seeds, other in
initial parameters and in the order of the data, are trained with it and tested. The folder holds
VeLO's weights; without it VeLO is left out. Results: `runs/optimizer_shootout/<version>`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import tyro

from distaff import OptimizerConfig, data, tasks, zoo
from distaff.integrations import matplotlib as figures
from distaff.integrations import matplotlib_optimizers
from distaff.run.directory.run_directory import RunDirectory
from distaff.tune import Comparison, compare

# Schedule-free needs no schedule, L-BFGS searches along its line, VeLO has learned its steps.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {},
    "adam": {},
    "adamw": {"weight_decay": 0.1},
    "lion": {"weight_decay": 0.1},
    "muon": {},
    "schedule_free_adamw": {"schedule": "constant"},
    "prodigy": {},
    "lbfgs": {"schedule": "constant"},
    "velo": {},
}
OWN_RATES = {"lbfgs": (1.0,), "velo": (None,)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What can be set from the command line."""

    only: tuple[str, ...] = ()
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    num_epochs: int = 20
    target: float = 0.1
    velo: str | None = None
    root: str = "runs"


def maker(name: str, options: Options) -> Callable[[float | None], OptimizerConfig]:
    if name == "velo":
        return lambda _: OptimizerConfig("velo", options={"weights": options.velo})
    return lambda rate: OptimizerConfig(name, learning_rate=rate, **OPTIMIZERS[name])


def main(options: Options) -> Comparison:
    names = options.only or [name for name in OPTIMIZERS if name != "velo" or options.velo]
    found = compare(
        lambda optimizer, seed: tasks.Classifier(
            zoo.MLP((64, 64, 10)), optimizer=optimizer, seed=seed, root=None
        ),
        {name: maker(name, options) for name in names},
        {name: OWN_RATES.get(name, options.rates) for name in names},
        lambda seed: data.digits(batch_size=64, seed=seed),
        seeds=options.seeds,
        num_epochs=options.num_epochs,
        target=options.target,
    )
    directory = RunDirectory(options.root, "optimizer_shootout")
    figures.save(matplotlib_optimizers.comparison(found), directory.create() / "comparison.png")
    directory.write_text("table.txt", found.table() + "\n")
    print(f"\n{found.table()}\n\n{directory.path}")
    return found


if __name__ == "__main__":
    main(tyro.cli(Options))

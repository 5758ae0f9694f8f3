"""Tunes one MLP on digits with Optuna, in one process, and prints the seconds as JSON.

    python benchmarks/scripts/trials.py SYSTEM NUM_TRIALS NUM_EPOCHS FOLDER

Each system trains as many trials, with TPE and without a pruner, over the learning rate and the
weight decay of AdamW: the same layers, data, batch size and ranges. The clocks start after the
imports, with the data in memory, so they include what the process compiles.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.scripts.seeds import epoch_by_hand, loaders, splits

RATES, DECAYS = (1e-4, 1e-1), (1e-6, 1e-1)


@dataclasses.dataclass(frozen=True)
class Config:
    """What a study of Distaff varies."""

    optimizer: Any


def in_batches(num_trials: int, num_epochs: int, folder: Path, batch: int = 16) -> float:
    """A study of Distaff in batches, with logs and checkpoints of each trial."""
    import optuna

    from distaff import OptimizerConfig, tasks, tune, zoo

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def make_trainer(config: Config) -> Any:
        return tasks.Classifier(
            zoo.MLP((128, 10)),
            optimizer=config.optimizer,
            root=str(folder),
            enable_progress_bar=False,
            save_curves=False,
        )

    start = OptimizerConfig("adamw", learning_rate=1e-3, weight_decay=1e-3, schedule="constant")
    space = {
        "optimizer.learning_rate": tune.Float(*RATES, log=True),
        "optimizer.weight_decay": tune.Float(*DECAYS, log=True),
    }
    found = tune.study(
        make_trainer,
        space,
        Config(start),
        lambda config: tuple(loaders()),
        num_trials=num_trials,
        num_epochs=num_epochs,
        batch=batch,
        pruner=optuna.pruners.NopPruner(),
    )
    return float(found.best.value)


def one_by_one(num_trials: int, num_epochs: int, folder: Path) -> float:
    """The same study, one trial after the other."""
    return in_batches(num_trials, num_epochs, folder, batch=1)


def by_hand(num_trials: int, num_epochs: int, folder: Path, *, once: bool = False) -> float:
    """A hand-written loop in an objective; its step is compiled in each trial."""
    from functools import partial

    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    model = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(10)])
    (x, y), val, _ = splits()
    init = jax.jit(model.init)

    def loss_fn(params: Any, x: Any, y: Any) -> Any:
        logits = model.apply(params, x)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, (logits.argmax(-1) == y).mean()

    def step_of(tx: Any) -> Any:
        @partial(jax.jit, donate_argnums=(0, 1))
        def step(params: Any, opt_state: Any, x: Any, y: Any) -> Any:
            metrics, grads = jax.value_and_grad(loss_fn, has_aux=True)(params, x, y)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, jnp.stack(metrics)

        return step

    evaluate = jax.jit(loss_fn)
    injected = optax.inject_hyperparams(optax.adamw)(1e-3, weight_decay=1e-3)
    step_of_all = step_of(injected)

    def objective(trial: Any) -> float:
        rate = trial.suggest_float("learning_rate", *RATES, log=True)
        decay = trial.suggest_float("weight_decay", *DECAYS, log=True)
        params = init(jax.random.key(trial.number), x[:1])
        tx = injected if once else optax.adamw(rate, weight_decay=decay)
        step, opt_state, best = step_of_all if once else step_of(tx), tx.init(params), 0.0
        if once:
            values = {"learning_rate": rate, "weight_decay": decay}
            opt_state.hyperparams.update({n: jnp.float32(value) for n, value in values.items()})
        for epoch in range(num_epochs):
            state, order = (params, opt_state), [trial.number, epoch]
            params, opt_state = epoch_by_hand(step, state, (x, y), order)
            best = max(best, float(evaluate(params, *val)[1]))
            trial.report(best, epoch)
        return best

    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(folder / "study.journal"))
    )
    sampler = optuna.samplers.TPESampler(seed=0)
    study = optuna.create_study(storage=storage, direction="maximize", sampler=sampler)
    study.optimize(objective, n_trials=num_trials)
    return study.best_value


def by_hand_once(num_trials: int, num_epochs: int, folder: Path) -> float:
    """The same, with the values as arguments of one compiled step."""
    return by_hand(num_trials, num_epochs, folder, once=True)


SYSTEMS = {each.__name__: each for each in (in_batches, one_by_one, by_hand, by_hand_once)}


def main(system: str, num_trials: int, num_epochs: int, folder: Path) -> None:
    """Runs one study, and prints its seconds and its best accuracy."""
    importlib.import_module("flax.linen" if "hand" in system else "distaff.tasks")
    importlib.import_module("optuna")
    folder.mkdir(parents=True, exist_ok=True)
    starts = time.perf_counter(), time.process_time()
    best = SYSTEMS[system](num_trials, num_epochs, folder)
    wall, cpu = time.perf_counter() - starts[0], time.process_time() - starts[1]
    print("\n" + json.dumps({"seconds": wall, "cpu_seconds": cpu, "accuracies": [best]}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))

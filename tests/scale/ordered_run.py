"""A small run that logs the order of its examples, alone or as one of several processes."""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import distaff
from distaff import MeshConfig, data, metrics, tasks, zoo
from distaff.checkpoint import arrays
from distaff.execution.dispatch import calibration
from distaff.execution.feed import chunk
from distaff.run.processes.store import SharedStore
from distaff.run.processes.support import check_same_batches

BATCH = 8
RANDOM = np.random.default_rng(0)
ROWS = {
    "image": RANDOM.normal(size=(6 * BATCH + 4, 8)).astype(np.float32),
    "label": RANDOM.integers(4, size=6 * BATCH + 4).astype(np.int32),
    "id": np.arange(6 * BATCH + 4, dtype=np.float32),
}
MESH = MeshConfig(1, fsdp=4, min_size=16)


class Ordered(distaff.TrainerModule):
    """Logs, as `order`, a number that depends on the order of the examples."""

    def loss_fn(self, params: Any, batch: Any, ctx: Any) -> Any:
        """Returns the loss, and in training the order."""
        logits = ctx.apply(params, batch["image"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        places = jnp.arange(1, len(logits) + 1, dtype=jnp.float32)
        if ctx.train:
            return loss, {"order": (batch["id"] * places).sum()}
        # A metric whose state is one value per example, on the device of the example.
        return loss, {"auroc": metrics.AUROC.per_example(batch["label"] == 0, logits[:, 0])}


class At(distaff.Callback):
    """Calls a function after the first chunk that ends at or after a step."""

    def __init__(self, step: int, function: Any) -> None:
        self.step, self.function = step, function

    @contextmanager
    def around_epoch(self, directory: Path | None) -> Generator[Any]:
        """Watches the chunks of an epoch; steps stay fused."""
        yield self._around

    @contextmanager
    def _around(self, steps: range) -> Generator[None]:
        yield
        if steps[-1] >= self.step:
            self.function()


class Stop(distaff.Callback):
    """Stops the run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, info: distaff.StepInfo) -> None:
        """Stops the run."""
        if info.step == self.step:
            raise distaff.StopTraining("enough")


def make(root: Any, *callbacks: distaff.Callback, width: int = 16, **options: Any) -> Ordered:
    """Returns a trainer."""
    return Ordered(
        zoo.MLP((width, 4)),
        callbacks=callbacks,
        optimizer=distaff.OptimizerConfig("adamw", learning_rate=1e-2),
        **{"mesh": MESH, "root": root, "log_every_n_steps": 1, "recompile": "error", **options},
    )


def train(trainer: Ordered, num_epochs: int, batch: int = BATCH) -> Any:
    """Trains on the rows."""
    loader = data.ArrayLoader(ROWS, batch, shuffle=True)
    return trainer.train_model(loader, data.ArrayLoader(ROWS, batch), num_epochs=num_epochs)


NEVER = At(10**6, lambda: None)


def moved(root: Any, *callbacks: At, **options: Any) -> Any:
    """Trains the run that moves between one and two processes."""
    return train(make(root, *callbacks, name="moved", steps_per_call=2, **options), 30)


def growing(root: Any, *callbacks: distaff.Callback, **options: Any) -> Any:
    """Trains the run that moves from two processes to three, and to one, with a device each."""
    mesh = {"mesh": MeshConfig(1, fsdp=-1, min_size=16), **options}
    trainer = make(root, *callbacks, width=12, name="growing", save_every="7 steps", **mesh)
    return train(trainer, 25, batch=12)


def measured(rank: int, root: Any) -> dict[str, Any]:
    """Trains with a form that is measured, by clocks on which the processes do not agree."""
    ticks = itertools.count(0.0, 0.04 if rank else 0.004)
    calibration.time = SimpleNamespace(perf_counter=ticks.__next__)
    options = {"name": "measured", "steps_per_call": "measure", "enable_progress_bar": False}
    trainer = make(root, **options)
    losses = [float(x) for x in train(trainer, 1).history["step/loss"]]
    forms = trainer.last_run.forms
    return {"loss": losses, "why": forms.why, "num_steps": forms.chunk_size.num_steps}


def packed(root: Any, **options: Any) -> dict[str, Any]:
    """Trains a language model on packed sequences."""
    random = np.random.default_rng(1)
    sequences = [random.integers(1, 16, size=random.integers(2, 9)) for _ in range(150)]
    trainer = tasks.LanguageModel(
        zoo.GPT(16, num_layers=1, num_heads=2, features=16, max_length=12),
        optimizer=distaff.OptimizerConfig("adamw", learning_rate=1e-2, schedule="constant"),
        **{"mesh": MESH, "root": root, "log_every_n_steps": 1, "name": "packed", **options},
    )
    loader = data.packed(sequences, 12, BATCH, shuffle=True)
    result = trainer.train_model(loader, num_epochs=3)
    return {"packed": [float(x) for x in result.history["step/loss"]]}


def tampered(root: Any, params: Any) -> str:
    """Returns the error of a save whose arrays are not those on the disk."""
    write = arrays.write
    arrays.write = lambda path, tree, info: write(path, jax.tree.map(lambda x: 2 * x, tree), info)
    try:
        SharedStore(Path(root, "tampered")).save(1, {"params": params}, {})
    except distaff.errors.CheckpointError as error:
        return str(error)
    finally:
        arrays.write = write
    return ""


def terminate() -> None:
    """Asks this process to end."""
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt() -> None:
    """Acts as Ctrl-C does."""
    raise KeyboardInterrupt


def refused(train: Any) -> str:
    """Returns the error of a training that is not possible."""
    try:
        train()
    except distaff.errors.ConfigError as error:
        return str(error)
    return ""


def join(rank: int, address: str) -> None:
    """Joins the other process; each has two devices."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_thread_guard", True)
    jax.distributed.initialize(
        address,
        2,
        rank,
        coordinator_bind_address=address if rank == 0 else None,
        initialization_timeout=120,
        shutdown_timeout_seconds=60,
    )


def show(facts: dict[str, Any]) -> None:
    """Prints facts as JSON, for the test."""
    print(f"facts {json.dumps(facts)}", flush=True)


def first(rank: int, root: str) -> None:
    """Trains and evaluates; tries what needs one process."""
    parts: set[int] = set()
    gather = chunk.Rows.__getitem__

    def counted(self: Any, index: tuple[slice, ...]) -> Any:
        rows = gather(self, index)
        parts.add(rows.shape[self._index.ndim - 1])
        return rows

    chunk.Rows.__getitem__ = counted
    slow = At(0, lambda: time.sleep(0.02 * rank))
    trainer = make(root, slow, name="whole")
    result = train(trainer, 2)
    loader = data.ArrayLoader(ROWS, BATCH)
    shard = {name: leaf[rank * BATCH :] for name, leaf in ROWS.items()}
    show(
        {
            "path": str(result.path),
            "status": result.status,
            "loss": [float(x) for x in result.history["step/loss"]],
            "metrics": {name: float(x) for name, x in result.metrics.items()},
            "evaluated": float(trainer.eval_model(loader)["loss"]),
            "predicted": trainer.predict(loader).tolist(),
            "parts": sorted(parts),
            "tampered": tampered(root, trainer.state.params),
            "measured": [measured(rank, root), measured(rank, root)],
            "errors": [
                refused(lambda: train(make(None, mesh=None), 1)),
                refused(lambda: train(make(None, debug=True), 1)),
                refused(lambda: make(None).train_model(lambda: iter([ROWS]), num_epochs=1)),
                refused(lambda: check_same_batches({"train": (loader, shard)})),
            ],
        }
    )


def second(rank: int, root: str) -> None:
    """One of the processes stops a run; then one is asked to end."""
    result = train(make(root, Stop(9 if rank else 10**6), name="stopped"), 100)
    show({"status": result.status, "reason": result.reason, "step": result.step})
    moved(root, NEVER, At(9 if rank else 10**6, terminate))


def third(rank: int, root: str) -> None:
    """Resumes; then one of the processes fails."""
    result = moved(root, NEVER, NEVER)
    show({"status": result.status, "first_step": result.first_step, "path": str(result.path)})
    show(packed(root))

    def fail() -> None:
        raise ValueError("broken")

    train(make(None, At(9 if rank else 10**6, fail), name="failed"), 60)


def main() -> None:
    """Runs a part in one of the two processes."""
    faulthandler.enable()
    rank, address, root, part = sys.argv[1:]
    join(int(rank), address)
    {"first": first, "second": second, "third": third}[part](int(rank), root)

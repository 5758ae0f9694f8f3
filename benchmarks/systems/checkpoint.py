"""How long training waits for a checkpoint of 10 M parameters and Adam's two moments: 126 MB.

A round is one save, from the call to the moment when training can continue: what is written in the
background after that is `write_seconds`, and is waited for before the next round.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.worker import Rounds
from benchmarks.workloads import Workload

_WIDTH, _LAYERS = 1024, 10


class Wide(nn.Module):
    """Ten layers of 1024: 10.5 M parameters."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns `[batch, 1024]`."""
        for _ in range(_LAYERS):
            x = nn.Dense(_WIDTH)(x)
        return x


def _state() -> dict[str, Any]:
    params = Wide().init(jax.random.key(0), jnp.zeros((1, _WIDTH)))["params"]
    return {"params": params, "opt_state": optax.adam(1e-3).init(params)}


def orbax(workload: Workload, rounds: Rounds, folder: Path) -> None:
    """Orbax writes in the background, after it has copied the arrays."""
    from orbax.checkpoint import v1 as ocp

    state = _state()
    for number in rounds:
        jax.block_until_ready(state)
        rounds.start()
        response = ocp.save_pytree_async(folder / f"step_{number}", state)
        rounds.done(0.0)
        start = time.perf_counter()
        response.result()
        rounds.note(write_seconds=time.perf_counter() - start)


def savez(workload: Workload, rounds: Rounds, folder: Path) -> None:
    """NumPy writes one file, while training waits."""
    leaves = jax.tree.leaves(_state())
    for _ in rounds:
        jax.block_until_ready(leaves)
        rounds.start()
        np.savez(folder / "state.npz", *map(np.asarray, leaves))
        rounds.done(0.0)


def distaff_save(workload: Workload, rounds: Rounds, folder: Path) -> None:
    """`save_model` of a run with its defaults, at the end of each epoch of one step."""
    import distaff

    class Saving(distaff.TrainerModule):
        def loss_fn(self, params: Any, batch: Any, ctx: Any) -> Any:
            return jnp.square(ctx.apply(params, batch["x"])).mean(axis=1)

        def save_model(self, metrics: Any, is_best: bool) -> None:
            jax.block_until_ready(self.state)
            rounds.start()
            super().save_model(metrics, is_best)
            rounds.done(0.0)

    class Conversation(distaff.Callback):
        def on_checkpoint(self, info: distaff.StepInfo) -> None:
            start = time.perf_counter()
            trainer.last_run.checkpointer.store.wait()
            rounds.note(write_seconds=time.perf_counter() - start)
            if not rounds.asked():
                raise distaff.StopTraining("all rounds are done")

    trainer = Saving(
        Wide(), optimizer=optax.adam(1e-3), root=str(folder), callbacks=[Conversation()]
    )
    loader = distaff.data.ArrayLoader({"x": np.ones((1, _WIDTH), np.float32)}, 1)
    if rounds.asked():
        trainer.train_model(loader, num_epochs=10_000)

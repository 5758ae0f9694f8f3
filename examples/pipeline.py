"""A pipeline: each device holds a quarter of the layers and passes its activations on (GPipe).

    .venv/bin/python examples/pipeline.py

A batch is cut into micro-batches, so that all stages work at the same time (Huang et al., "GPipe",
2019, figure 2). The eight devices are simulated; on accelerators, leave out `simulate_devices`.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import tyro
from jax.sharding import PartitionSpec

from distaff import MeshConfig, OptimizerConfig, TrainResult, data, tasks

MESH = MeshConfig(data=2, pipe=4, rules=(("stages", ("pipe",)),))
NUM_MICRO = 4


@jax.checkpoint
def stage(kernels: jax.Array, x: jax.Array) -> jax.Array:
    """The layers of one stage: kernels `[layers, features, features]`, x `[batch, features]`."""
    return jax.lax.scan(lambda x, kernel: (x + nn.gelu(x @ kernel), None), x, kernels)[0]


def on_one_device(kernels: jax.Array, x: jax.Array) -> jax.Array:
    """Runs this device's stage once per tick; kernels `[1, layers, features, features]`."""
    index, last = jax.lax.axis_index("pipe"), jax.lax.axis_size("pipe") - 1
    micro = x.reshape(NUM_MICRO, -1, *x.shape[1:])
    # After the last micro-batch, the pipeline runs empty.
    inputs = jnp.concatenate([micro, jnp.zeros_like(micro[:1]).repeat(last, 0)])

    def tick(received: jax.Array, entering: jax.Array) -> tuple[jax.Array, jax.Array]:
        result = stage(kernels[0], jnp.where(index == 0, entering, received))
        return jax.lax.ppermute(result, "pipe", [(n, n + 1) for n in range(last)]), result

    start = jax.lax.pcast(jnp.zeros_like(inputs[0]), "pipe", to="varying")
    results = jax.lax.scan(tick, start, inputs)[1][last:]
    return jax.lax.psum(jnp.where(index == last, results, 0), "pipe").reshape(x.shape)


class Pipeline(nn.Module):
    """A residual network in stages; without a mesh, one device computes them all."""

    mesh: MeshConfig | None = None
    features: int = 64

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dense(self.features)(image.reshape(len(image), -1))
        shape = (4, 2, self.features, self.features)
        stages = self.param("stages", nn.initializers.normal(0.02), shape)
        if self.mesh is None:
            return nn.Dense(10)(nn.LayerNorm()(stage(stages.reshape(-1, *shape[2:]), x)))
        devices, batch = self.mesh.mesh(), PartitionSpec("data")
        specs = PartitionSpec("pipe"), batch
        run = jax.shard_map(on_one_device, mesh=devices, in_specs=specs, out_specs=batch)
        missing = -len(x) % (NUM_MICRO * devices.shape["data"])  # of a last, smaller batch
        x = run(stages, jnp.pad(x, ((0, missing), (0, 0))))[: len(x)]
        return nn.Dense(10)(nn.LayerNorm()(x))


def main(num_epochs: int = 5, mesh: bool = True, root: str = "runs") -> TrainResult:
    train, val, test = data.digits(batch_size=64)
    chosen, num_devices = (MESH, 8) if mesh else (None, None)
    trainer = tasks.Classifier(
        Pipeline(chosen),
        optimizer=OptimizerConfig("adamw", learning_rate=1e-3),
        mesh=chosen,
        simulate_devices=num_devices,
        root=root,
    )
    return trainer.train_model(train, val, test, num_epochs=num_epochs)


if __name__ == "__main__":
    tyro.cli(main)

"""A small learned optimizer: a network that turns gradients into updates, and is trained to train.

Evolution strategies look for weights with which a network with 16 hidden units learns most in 100
steps. Then 190 steps train 64 hidden units, alongside Adam. `runs/learned.npy` keeps the weights.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import tyro
from jax.flatten_util import ravel_pytree

from distaff import OptimizerConfig, TrainState, data, tasks, zoo

NETWORK = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(2)])
FLAT = ravel_pytree(NETWORK.init(jax.random.key(0), jnp.ones(3)))  # weights, unravel


def learned_optimizer(weights: jax.Array, total_steps: int) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(b2=0.99)

    def update(grads, state, params=None):
        momentum, state = adam.update(grads, state)

        def step(momentum, grad, square):
            time = jnp.full_like(grad, state.count / total_steps)
            inputs = jnp.stack([momentum, grad / (jnp.sqrt(square) + 1e-8), time], axis=-1)
            size, shift = jnp.moveaxis(NETWORK.apply(FLAT[1](weights), inputs), -1, 0)
            return -3e-3 * jnp.exp(size) * (momentum + 0.1 * shift)

        return jax.tree.map(step, momentum, grads, state.nu), state

    return optax.GradientTransformation(adam.init, update)


def meta_train(images: jax.Array, labels: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
    model, meta, sigma = zoo.MLP((16, 10)), optax.adam(0.03), 0.1

    def loss(params, rows):
        logits = model.apply(params, images[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    def training(weights, key):  # returns the mean loss of steps 81 to 100
        def step(state, key):
            rows = jax.random.randint(key, (64,), 0, len(labels))
            value, grads = jax.value_and_grad(loss)(state.params, rows)
            return state.apply_gradients(grads=grads), value

        params, tx = model.init(key, images[:1]), learned_optimizer(weights, 100)
        state = TrainState.create(params=params, tx=tx)
        return jax.lax.scan(step, state, jax.random.split(key, 100))[1][-20:].mean()

    def meta_step(carry, key):
        (weights, state), keys = carry, jax.random.split(key, 8)
        noise = sigma * jax.random.normal(key, (8, len(weights)))
        up, down = (jax.vmap(training)(weights[None] + each, keys) for each in (noise, -noise))
        updates, state = meta.update((up - down) @ noise / (16 * sigma**2), state)
        return (optax.apply_updates(weights, updates), state), (up + down).mean() / 2

    keys = jax.random.split(jax.random.key(0), steps)
    (weights, _), losses = jax.lax.scan(meta_step, (FLAT[0], meta.init(FLAT[0])), keys)
    return weights, losses


def main(meta_steps: int = 120, num_epochs: int = 10, root: str = "runs") -> dict[str, float]:
    train, val, test = data.digits(batch_size=64)
    weights, losses = meta_train(*map(jnp.asarray, train.arrays.values()), meta_steps)
    print(f"loss after 100 steps: {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    optimizers = {"adam": OptimizerConfig("adam", learning_rate=1e-2)}
    optimizers["learned"] = lambda total_steps: learned_optimizer(weights, total_steps)
    for name, each in optimizers.items():
        trainer = tasks.Classifier(zoo.MLP((64, 10)), optimizer=each, name=name, root=root)
        optimizers[name] = trainer.train_model(train, val, test, num_epochs=num_epochs)
    jnp.save(f"{root}/learned.npy", weights)
    return {name: result.metrics["val/loss"] for name, result in optimizers.items()}


if __name__ == "__main__":
    print("validation loss:", tyro.cli(main))

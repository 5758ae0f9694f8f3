"""The handwritten digits by hand: the same MLP, a log, and the best weights in a file."""

import json
import sys
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits


class MLP(nn.Module):
    """64-128-10."""

    @nn.compact
    def __call__(self, x):
        """Returns logits."""
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x)))


digits = load_digits()
images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
order = np.random.default_rng(0).permutation(len(labels))
train, val, test = np.split(order, [1257, 1437])

model, tx, folder = MLP(), optax.adam(1e-3), Path(sys.argv[1])
params = jax.jit(model.init)(jax.random.key(0), images[:1])["params"]
opt_state = jax.jit(tx.init)(params)


def loss_fn(params, x, y):
    """Returns loss and accuracy."""
    logits = model.apply({"params": params}, x)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, (logits.argmax(-1) == y).mean()


@partial(jax.jit, donate_argnums=(0, 1))
def step(params, opt_state, x, y):
    """Returns new parameters and optimizer state, and the metrics."""
    metrics, grads = jax.value_and_grad(loss_fn, has_aux=True)(params, x, y)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, jnp.stack(metrics)


evaluate = jax.jit(loss_fn)
folder.mkdir(parents=True, exist_ok=True)
best, log = 0.0, (folder / "metrics.jsonl").open("w")
for epoch in range(1, 21):
    rows = np.random.default_rng([0, epoch]).permutation(train)
    metrics = []
    for start in range(0, len(rows) - 63, 64):
        batch = rows[start : start + 64]
        params, opt_state, last = step(params, opt_state, images[batch], labels[batch])
        metrics.append(last)
    loss, accuracy = np.mean(jax.device_get(metrics), axis=0)
    val_loss, val_accuracy = map(float, evaluate(params, images[val], labels[val]))
    line = {"epoch": epoch, "loss": float(loss), "accuracy": float(accuracy)}
    line |= {"val_loss": val_loss, "val_accuracy": val_accuracy}
    log.write(json.dumps(line) + "\n")
    print(line)
    if val_accuracy > best:
        best = val_accuracy
        np.savez(folder / "best.npz", *map(np.asarray, jax.tree.leaves(params)))
leaves = list(np.load(folder / "best.npz").values())
params = jax.tree.unflatten(jax.tree.structure(params), leaves)
print(float(evaluate(params, images[test], labels[test])[1]))

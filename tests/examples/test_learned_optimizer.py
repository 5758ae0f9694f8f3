"""An optimizer is trained, trains a network, and is kept."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest


def test_untrained_optimizer_without_weights_is_adam(example) -> None:
    module = example("learned_optimizer")
    params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}
    grads = jax.tree.map(lambda leaf: leaf - 2, params)
    learned = module.learned_optimizer(jnp.zeros_like(module.FLAT[0]), total_steps=10)
    adam = optax.adam(3e-3, b2=0.99)
    states = [tx.init(params) for tx in (learned, adam)]
    updates = [jax.jit(tx.update) for tx in (learned, adam)]
    for _ in range(3):
        pairs = [update(grads, state) for update, state in zip(updates, states, strict=True)]
        states = [state for _, state in pairs]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), pairs[0][0], pairs[1][0]
        )


@pytest.mark.slow
def test_meta_training_makes_trainings_faster(example, tmp_path: Path, capsys) -> None:
    module = example("learned_optimizer")
    scores = module.main(meta_steps=15, num_epochs=4, root=str(tmp_path))
    assert list(scores) == ["adam", "learned"]
    assert scores["learned"] < 1  # untrained guesses have 2.3
    words = capsys.readouterr().out.split("loss after 100 steps: ")[1].split()
    assert float(words[3]) < float(words[0])
    weights = np.load(tmp_path / "learned.npy")
    assert weights.shape == module.FLAT[0].shape
    assert not np.array_equal(weights, module.FLAT[0])
    record = (tmp_path / "learned" / "0001" / "config.json").read_text()
    assert "learned_optimizer" in record

"""Two networks with two optimizers, in a step of one's own, play against each other."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest


@pytest.mark.slow
def test_gan_measures_held_out_noise_and_draws_its_samples(example, capsys) -> None:
    module = example("gan")
    result = module.main(module.Options(num_epochs=5))
    pictures = sorted(path.name for path in Path("runs/gan/0001/images").iterdir())
    assert pictures == sorted(f"samples_{93 * epoch}.png" for epoch in (1, 2, 3, 4, 5))
    last = Path("runs/gan/0001/images/samples_465.png").read_bytes()
    assert struct.unpack(">II", last[16:24]) == (5 * 164, 160)
    assert result.metrics["test/good"] != result.metrics["val/good"]
    assert 0 <= result.metrics["test/rarest_mode"] <= result.metrics["test/good"] / 8
    assert "'test/modes'" in capsys.readouterr().out
    optimizer = json.loads((result.path / "config.json").read_text())["optimizer"]
    (group,) = optimizer["groups"]
    assert group["pattern"] == "discriminator/*"
    assert group["optimizer"]["name"] == optimizer["name"] == "adam"


@pytest.mark.slow
def test_gan_networks_are_updated_at_once_and_against_each_other(example) -> None:
    module = example("gan")
    noise = np.random.default_rng(3).normal(size=(64, 4)).astype(np.float32)
    real = module.RING.sample(64, 4)
    trainer = module.GAN(
        module.Networks(), example_batch=(noise, real), root=None, enable_progress_bar=False
    )
    before = jax.tree.map(np.array, trainer.state.params)

    def judged(params, points):
        return module.zoo.MLP((128, 128, 1)).apply({"params": params["discriminator"]}, points)[
            :, 0
        ]

    def pairs(params):
        fake = module.zoo.MLP((128, 128, 2)).apply({"params": params["generator"]}, noise)
        return jnp.log(1 + jnp.exp(judged(params, fake) - judged(params, real))).mean()

    def penalty(params):
        slopes = jax.vmap(jax.grad(lambda x: judged(params, x[None])[0]))(real)
        return (slopes**2).sum(axis=1).mean() / 2

    wins = jax.grad(pairs)(before)
    expected = {
        "discriminator": jax.grad(lambda p: pairs(p) + penalty(p))(before)["discriminator"],
        "generator": jax.tree.map(jnp.negative, wins["generator"]),
    }
    state = trainer.state.replace(tx=optax.sgd(1.0), opt_state=optax.sgd(1.0).init(before))
    state, metrics = trainer.train_step(state, (noise, real))
    moved = jax.tree.map(lambda old, new: old - np.asarray(new), before, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), moved, expected)
    assert float(metrics["loss"]) == pytest.approx(float(pairs(before) + penalty(before)), rel=1e-5)

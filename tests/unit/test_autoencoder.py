from __future__ import annotations

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff import OptimizerConfig, data, tasks, zoo
from distaff.errors import ConfigError, LossError
from distaff.step.context import Context
from distaff.tasks.autoencoder import AutoencoderConfig


class Scaled(nn.Module):
    """Returns its input, times its one parameter: the error is then known exactly."""

    factor: float = 1.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, shift=0.0):
        factor = self.param("factor", lambda _: jnp.float32(self.factor))
        return (factor.astype(x.dtype) * x + shift).astype(self.dtype)


def images(examples: int = 4, seed: int = 0) -> np.ndarray:
    shape = (examples, 3, 2, 1)
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


def make(model: nn.Module, batch, cls: type = tasks.Autoencoder, **options):
    options = {"root": None, "enable_progress_bar": False, **options}
    return cls(model, example_batch=batch, **options)


def evaluated(trainer, batch, step: int = 0, train: bool = False):
    state = trainer.state.replace(step=jnp.int32(step))
    params = jax.tree.map(jnp.copy, state.params)
    return trainer.loss_fn(params, batch, Context(state, train=train))


def test_autoencoder_averages_the_error_over_all_but_the_batch():
    x = images()
    loss, metrics = evaluated(make(Scaled(0.5), {"image": x}), {"image": x})
    error = np.square(0.5 * x).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(loss, error, rtol=1e-6)
    np.testing.assert_allclose(metrics["psnr"], -10 * np.log10(error), rtol=1e-5)


def test_autoencoder_measures_psnr_within_the_range_of_the_data():
    x = 255 * images()
    trainer = make(Scaled(0.5), x, data_range=255.0)
    _, metrics = evaluated(trainer, x)
    error = np.square(0.5 * x / 255).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(metrics["psnr"], -10 * np.log10(error), rtol=1e-5)


def test_autoencoder_gives_a_perfect_example_a_finite_psnr():
    x = images()
    loss, metrics = evaluated(make(Scaled(1.0), x), x)
    np.testing.assert_array_equal(loss, 0)
    np.testing.assert_allclose(metrics["psnr"], 100, rtol=1e-6)


def test_autoencoder_compares_in_float32():
    x = 2000 * images().astype(np.float16)
    loss, _ = evaluated(make(Scaled(0.0, "float16"), x), x)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, np.square(x.astype(np.float32)).mean((1, 2, 3)), rtol=1e-5)


def test_denoising_compares_what_it_makes_of_the_corrupted_input_with_the_clean_one():
    x = images(500)
    trainer = make(Scaled(1.0), {"image": x}, noise=0.3)
    loss, _ = evaluated(trainer, {"image": x})
    np.testing.assert_allclose(np.mean(loss), 0.3**2, rtol=0.06)
    # The model that returns nothing is judged by the clean input, without any noise.
    loss, _ = evaluated(make(Scaled(0.0), x, noise=0.3), x)
    np.testing.assert_allclose(loss, np.square(x).mean((1, 2, 3)), rtol=1e-6)
    np.testing.assert_array_equal(trainer.predict([x]), x)


def test_denoising_draws_new_noise_at_each_step_and_the_same_in_each_evaluation():
    x = images()
    trainer = make(Scaled(1.0), x, noise=0.3)
    losses = [evaluated(trainer, x, step, train=True)[0] for step in (0, 1, 0)]
    assert np.all(losses[0] != losses[1])
    np.testing.assert_array_equal(losses[0], losses[2])
    evaluations = [evaluated(trainer, x, step)[0] for step in (0, 1)]
    np.testing.assert_array_equal(*evaluations)


def test_autoencoder_can_corrupt_in_another_way():
    class Masking(tasks.Autoencoder):
        def corrupt(self, inputs, rng):
            return inputs * jax.random.bernoulli(rng, 0.5, inputs.shape)

    x = images(300)
    loss, _ = evaluated(make(Scaled(1.0), x, Masking), x)
    np.testing.assert_allclose(np.mean(loss), np.square(x).mean() / 2, rtol=0.1)


def test_autoencoder_hands_on_what_the_model_takes_besides():
    class Conditional(tasks.Autoencoder):
        def model_inputs(self, batch):
            return batch["image"], batch["shift"]

    batch = {"image": images(), "shift": np.full((4, 1, 1, 1), 2, np.float32)}
    loss, _ = evaluated(make(Scaled(1.0), batch, Conditional), batch)
    np.testing.assert_allclose(loss, 4, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "batch", "parts"),
    [
        (
            nn.Dense(3),
            images(),
            ("must return the shape of its input", "(4, 3, 2, 1)", "(4, 3, 2, 3)"),
        ),
        (Scaled(), np.ones((4, 2), np.uint8), ("inputs must be floats", "uint8", "images / 255")),
    ],
)
def test_autoencoder_refuses_what_it_cannot_compare(model, batch, parts):
    trainer = tasks.Autoencoder(model, enable_progress_bar=False)
    with pytest.raises(LossError) as raised:
        trainer.train_model([batch], num_epochs=1)
    assert all(part in str(raised.value) for part in parts)
    assert not Path("runs").exists()


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "much"])
@pytest.mark.parametrize("name", ["noise", "data_range"])
def test_autoencoder_refuses_options_out_of_range(name, value):
    with pytest.raises(ConfigError, match=rf"{name}.* must be .*finite number.* got {value!r}"):
        tasks.Autoencoder(Scaled(), **{name: value})


def test_autoencoder_options_are_checked_with_those_of_every_trainer():
    with pytest.raises(ConfigError, match="keep_last"):
        AutoencoderConfig(keep_last=0)
    with pytest.raises(ConfigError, match="Did you mean 'noise'"):
        tasks.Autoencoder(Scaled(), nois=0.3)
    with pytest.raises(ConfigError, match="data_range"):
        AutoencoderConfig(data_range=0)


@pytest.mark.slow
def test_autoencoder_is_loaded_with_its_noise(tmp_path):
    x = images(16)
    model = zoo.MLPAutoencoder((3, 2, 1), latent=2, hidden=(4,))
    options = {"root": str(tmp_path), "enable_progress_bar": False, "noise": 0.3}
    trainer = tasks.Autoencoder(model, **options)
    loader = data.ArrayLoader({"image": x}, batch_size=8)
    result = trainer.train_model(loader, loader, loader, num_epochs=1)
    assert json.loads((result.path / "config.json").read_text())["options"]["noise"] == 0.3
    loaded = tasks.Autoencoder.load_from_checkpoint(result.path)
    assert loaded.config.noise == 0.3
    tested = loaded.eval_model(loader, "test/")
    assert tested == {name: result.metrics[name] for name in ("test/loss", "test/psnr")}


def test_linear_autoencoder_reaches_the_principal_components():
    random = np.random.default_rng(0)
    x = random.normal(size=(64, 6)) @ np.diag([3, 2, 1, 0.5, 0.3, 0.2])
    x = (x @ np.linalg.qr(random.normal(size=(6, 6)))[0]).astype(np.float32)
    least = np.square(np.linalg.svd(x)[1][2:]).sum() / x.size

    class Linear(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(6, use_bias=False)(nn.Dense(2, use_bias=False)(x))

    optimizer = OptimizerConfig("adam", learning_rate=3e-2)
    trainer = tasks.Autoencoder(Linear(), optimizer=optimizer, root=None, enable_progress_bar=False)
    result = trainer.train_model([x] * 250, num_epochs=6)
    np.testing.assert_allclose(trainer.eval_model([x])["loss"], least, rtol=1e-3)
    assert result.metrics["train/loss"] >= least * (1 - 1e-5)


@pytest.mark.slow
def test_mlp_autoencoder_keeps_so_many_numbers_and_returns_the_shape():
    model, x = zoo.MLPAutoencoder((3, 2, 1), latent=2, hidden=(5, 4)), images()
    variables = model.init(jax.random.key(0), x)
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert {path: [*layers] for path, layers in shapes.items()} == {
        name: ["Dense_0", "Dense_1", "Dense_2"] for name in ("encoder", "decoder")
    }
    for part, outputs in (("encoder", [5, 4, 2]), ("decoder", [4, 5, 6])):
        assert [layer["bias"] for layer in shapes[part].values()] == [(n,) for n in outputs]

    code = model.apply(variables, x, method="encode")
    decoded = model.apply(variables, 100 * code, method="decode")
    assert code.shape == (4, 2)
    assert decoded.shape == x.shape
    assert 0 <= decoded.min() <= decoded.max() <= 1
    rebuilt = model.apply(variables, x)
    np.testing.assert_array_equal(rebuilt, model.apply(variables, code, method="decode"))
    assert not np.array_equal(rebuilt[0], rebuilt[1])

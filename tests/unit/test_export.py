"""Exported models: the outputs of `predict`, in a process without Distaff."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff import export_model, tasks, zoo
from distaff.errors import BatchError, ConfigError, StateError
from model_kinds import KINDS, NAMES

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(12, 8, 8, 1)).astype(np.float32)
BATCH = {"image": IMAGES, "label": np.arange(12, dtype=np.int32) % 10}


def trained(model: Any = None, batch: Any = BATCH, **options: Any) -> tasks.Classifier:
    options = {"root": None, "enable_progress_bar": False, "batch_size": 4, **options}
    trainer = tasks.Classifier(model or zoo.MLP((8, 10)), **options)
    trainer.train_model(batch, num_epochs=1)
    return trainer


def loaded(folder: Path, **inputs: np.ndarray) -> np.ndarray:
    """Returns the outputs of the folder's own loader, in this process."""
    scope: dict[str, Any] = {"__file__": str(folder / "load.py"), "__name__": "load"}
    exec((folder / "load.py").read_text(), scope)
    return np.asarray(scope["load"]()(**inputs))


@pytest.mark.parametrize("name", NAMES)
def test_export_has_the_outputs_of_predict_for_batches_of_any_size(name, tmp_path):
    rows = RNG.normal(size=(12, 3)).astype(np.float32)
    batch = {"x": rows, "y": rows[:, :1]}
    model = KINDS[name].mlp(0.5, True)  # dropout and batch normalisation
    trainer = tasks.Regressor(model, root=None, enable_progress_bar=False, batch_size=4)
    trainer.train_model(batch, num_epochs=1)
    folder = export_model(trainer, tmp_path / "model", batch)
    for size in (1, 5, 12):
        outputs, expected = loaded(folder, x=rows[:size]), trainer.predict({"x": rows[:size]})
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)


def test_process_without_distaff_has_the_same_outputs(tmp_path):
    trainer = trained()
    folder = export_model(trainer, tmp_path / "model", BATCH)
    np.save(tmp_path / "images.npy", IMAGES)
    program = (
        "import sys; sys.modules['distaff'] = sys.modules['flax'] = None\n"
        "import numpy as np\nfrom load import load\n"
        "np.save('../outputs.npy', load()(image=np.load('../images.npy')))\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True, timeout=120)
    expected = trainer.predict({"image": IMAGES})
    np.testing.assert_allclose(np.load(tmp_path / "outputs.npy"), expected, rtol=1e-5, atol=1e-6)


def test_description_names_inputs_outputs_and_versions(tmp_path):
    folder = export_model(trained(), tmp_path / "model", BATCH)
    facts = json.loads((folder / "model.json").read_text())
    assert facts["inputs"] == {"image": {"shape": ["batch", 8, 8, 1], "dtype": "float32"}}
    assert facts["outputs"] == {"outputs": {"shape": ["batch", 10], "dtype": "float32"}}
    assert facts["num_parameters"] == 64 * 8 + 8 + 8 * 10 + 10
    assert facts["platforms"] == ["cpu", "cuda", "tpu"]
    assert facts["versions"]["jax"] == jax.__version__
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "load.py",
        "model.jax",
        "model.json",
        "weights.npz",
    ]
    assert "predict(image=...)  # float32 [batch, 8, 8, 1]" in (folder / "load.py").read_text()


def test_array_stands_for_the_inputs(tmp_path):
    trainer = trained(batch=(IMAGES, BATCH["label"]))
    folder = export_model(trainer, tmp_path / "model", IMAGES)
    np.testing.assert_allclose(loaded(folder, inputs=IMAGES), trainer.predict(IMAGES), rtol=1e-5)


def test_leaves_of_a_tuple_have_names(tmp_path):
    trainer = trained(batch=(IMAGES, BATCH["label"]))
    folder = export_model(trainer, tmp_path / "model", (IMAGES, BATCH["label"]))
    np.testing.assert_allclose(loaded(folder, input_0=IMAGES), trainer.predict(IMAGES), rtol=1e-5)


def test_averages_are_exported_by_name(tmp_path):
    trainer = trained(ema=0.5)
    outputs = {}
    for name in ("raw", "ema"):
        folder = export_model(trainer, tmp_path / name, BATCH, weights=name)
        outputs[name] = loaded(folder, image=IMAGES)
        expected = trainer.predict({"image": IMAGES}, weights=name)
        np.testing.assert_allclose(outputs[name], expected, rtol=1e-5)
    assert (outputs["raw"] != outputs["ema"]).any()


class WithKey(nn.Module):
    """A model whose state has a random key and a number that is not a float."""

    @nn.compact
    def __call__(self, x):
        key = self.variable("noise", "key", jax.random.key, 1)
        scale = self.variable("noise", "scale", lambda: jnp.uint8(2))
        return nn.Dense(1)(x) + scale.value * jax.random.normal(key.value, (1, 1))


class Sampled(tasks.Regressor):
    def predict_fn(self, params, batch, ctx):
        return ctx.apply(params, batch["x"]) + jax.random.normal(ctx.rng, (1, 1))


@pytest.mark.parametrize("kind", [tasks.Regressor, Sampled])
def test_random_keys_of_the_state_are_exported(kind, tmp_path):
    rows = RNG.normal(size=(12, 3)).astype(np.float32)
    trainer = kind(WithKey(), root=None, enable_progress_bar=False, batch_size=4)
    trainer.init_model({"x": rows})
    folder = export_model(trainer, tmp_path / "model", {"x": rows})
    weights = np.load(folder / "weights.npz")
    assert weights["collections/noise/key"].dtype == np.uint32
    assert weights["collections/noise/scale"].dtype == np.uint8
    np.testing.assert_allclose(loaded(folder, x=rows), trainer.predict({"x": rows}), rtol=1e-5)


def test_newer_jax_names_the_command(tmp_path):
    folder = export_model(trained(), tmp_path / "model", BATCH)
    (folder / "model.jax").write_bytes(b"of another version")
    with pytest.raises(RuntimeError, match=r"which JAX .* wrote.*distaff export RUN FOLDER"):
        loaded(folder, image=IMAGES)


def test_parameters_in_bfloat16_are_exact(tmp_path):
    trainer = trained(precision="bf16-params")
    folder = export_model(trainer, tmp_path / "model", BATCH)
    expected = trainer.predict({"image": IMAGES})
    np.testing.assert_allclose(loaded(folder, image=IMAGES), expected, rtol=1e-5, atol=1e-6)


class OfOneSize(tasks.Classifier):
    def predict_fn(self, params, batch, ctx):
        if batch["image"].shape[0] == 12:
            return ctx.apply(params, batch["image"])
        return ctx.apply(params, batch["image"]) + 1


class MoreThanSix(tasks.Classifier):
    def predict_fn(self, params, batch, ctx):
        return ctx.apply(params, batch["image"]) + (batch["image"].shape[0] > 6)


class OfNothing(tasks.Classifier):
    def predict_fn(self, params, batch, ctx):
        return jnp.zeros((12, 3))


@pytest.mark.parametrize(
    ("kind", "message"),
    [(OfOneSize, "pass batch_size="), (MoreThanSix, "Pass batch_size=")],
)
def test_model_of_one_size_needs_that_size(kind, message, tmp_path):
    options = {"root": None, "enable_progress_bar": False, "batch_size": 4}
    trainer = kind(zoo.MLP((8, 10)), **options)
    trainer.train_model(BATCH, num_epochs=1)
    with pytest.raises(ConfigError, match=message):
        export_model(trainer, tmp_path / "model", BATCH)
    assert list(tmp_path.iterdir()) == []
    folder = export_model(trainer, tmp_path / "model", BATCH, batch_size=12)
    outputs = loaded(folder, image=IMAGES)
    np.testing.assert_allclose(outputs, trainer.predict([{"image": IMAGES}]), rtol=1e-5, atol=1e-6)


def test_wrong_calls_leave_nothing(tmp_path):
    options = {"root": None, "enable_progress_bar": False}
    with pytest.raises(StateError, match="no parameters"):
        export_model(tasks.Classifier(zoo.MLP((8, 10)), **options), tmp_path / "model", BATCH)
    nothing = OfNothing(zoo.MLP((8, 10)), batch_size=4, **options)
    nothing.train_model(BATCH, num_epochs=1)
    with pytest.raises(BatchError, match="uses no leaf"):
        export_model(nothing, tmp_path / "model", BATCH)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match="exists"):
        export_model(trained(), tmp_path / "model", BATCH)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"platforms": ("cpu", "cudaa")}, "Did you mean 'cuda'?"),
    ],
)
def test_wrong_arguments_name_the_value(options, message, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(message)):
        export_model(trained(), tmp_path / "model", BATCH, **options)
    assert list(tmp_path.iterdir()) == []

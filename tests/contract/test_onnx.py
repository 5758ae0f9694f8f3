"""Models in ONNX: onnxruntime computes what `predict` computes."""

from __future__ import annotations

import builtins
import importlib.util
import sys

import numpy as np
import pytest

from distaff import cli, export_model, tasks, zoo
from distaff.errors import ConfigError, MissingExtraError

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(8, 8, 8, 1)).astype(np.float32)
TOKENS = RNG.integers(0, 32, (8, 16)).astype(np.int32)
LABELLED = {"image": IMAGES, "label": np.arange(8, dtype=np.int32)}
OPTIONS = {"batch_size": 4, "enable_progress_bar": False}
NEEDS = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("jax2onnx", "onnxruntime"))),
    reason="needs jax2onnx, onnxruntime: make test-onnx",
)

CASES = {
    "MLP": lambda **o: tasks.Classifier(zoo.MLP((8, 10)), **o),
    "CNN": lambda **o: tasks.Classifier(zoo.CNN(num_classes=10, features=(8, 8)), **o),
    "ResNet": lambda **o: tasks.Classifier(zoo.ResNet(num_classes=10), **o),
    "GPT": lambda **o: tasks.LanguageModel(
        zoo.GPT(vocab_size=32, num_layers=2, num_heads=2, features=16, max_length=16), **o
    ),
}


def outputs(path, name, values):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    return session.run(None, {name: values})[0]


@NEEDS
@pytest.mark.parametrize("name", CASES)
def test_onnxruntime_computes_what_predict_computes(name, tmp_path):
    batch = {"tokens": TOKENS} if name == "GPT" else LABELLED
    trainer = CASES[name](root=tmp_path, name=name, **OPTIONS)
    run = trainer.train_model(batch, num_epochs=2).path
    assert cli.main(("export", str(run), str(tmp_path / "model.onnx"))) == 0
    first = next(iter(batch))
    for size in (1, 3, 8):
        expected = trainer.predict({key: x[:size] for key, x in batch.items()})
        found = outputs(tmp_path / "model.onnx", first, batch[first][:size])
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@NEEDS
def test_model_that_onnx_computes_otherwise_leaves_nothing(tmp_path, monkeypatch):
    trainer = tasks.Classifier(zoo.MLP((8, 10)), root=None, **OPTIONS)
    trainer.init_model(LABELLED)
    monkeypatch.setattr("distaff.export.onnx.TOLERANCE", -1.0)
    with pytest.raises(ConfigError, match="must compute what the model computes"):
        export_model(trainer, tmp_path / "model.onnx", LABELLED)
    assert list(tmp_path.iterdir()) == []


def test_missing_package_and_wrong_arguments_say_what_to_do(tmp_path, monkeypatch):
    trainer = tasks.Classifier(zoo.MLP((8, 10)), root=None, **OPTIONS)
    trainer.init_model(LABELLED)
    with pytest.raises(ConfigError, match="no model card"):
        export_model(trainer, tmp_path / "model.onnx", LABELLED, license="mit")
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "jax2onnx":
            raise ModuleNotFoundError("no", name="jax2onnx")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    module = "distaff.integrations.deployment.jax2onnx"
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(MissingExtraError, match="pip install --no-deps jax2onnx"):
        export_model(trainer, tmp_path / "model.onnx", LABELLED)
    assert list(tmp_path.iterdir()) == []

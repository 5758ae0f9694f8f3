"""Metrics that a subclass adds to a task, over any batches."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from distaff import Monitor, metrics, tasks, zoo

X = np.random.default_rng(0).normal(size=(22, 4)).astype(np.float32)
Y = X.argmax(axis=1).astype(np.int32)
OPTIONS: dict[str, Any] = {"root": None, "enable_progress_bar": False, "batch_size": 8}


class Balanced(tasks.Classifier):
    monitor = Monitor("val/balanced", mode="max")

    def extra_metrics(self, outputs, batch, ctx):
        assert outputs.dtype == jnp.float32
        pair = batch[1], outputs.argmax(-1)
        return {"balanced": metrics.BalancedAccuracy.per_example(*pair, num_classes=4)}


def test_classifier_is_judged_by_a_metric_of_its_subclass():
    trainer = Balanced(zoo.MLP((4,)), precision="bf16", **OPTIONS)
    result = trainer.train_model((X, Y), (X, Y), num_epochs=2)
    expected = sklearn_metrics.balanced_accuracy_score(Y, trainer.predict(X).argmax(-1))
    assert result.best.metrics["val/balanced"] == pytest.approx(expected)
    assert "train/balanced" in result.metrics
    assert "val/accuracy" in result.metrics


@pytest.mark.parametrize("weight", [None, np.linspace(0, 1, 22, dtype=np.float32)])
@pytest.mark.slow
def test_regressor_has_the_metrics_of_its_subclass(weight):
    class Explained(tasks.Regressor):
        def extra_metrics(self, outputs, batch, ctx):
            if ctx.train:
                return {}
            weight = self.sample_weight(batch)
            return {"r2": metrics.R2.per_example(batch[1], outputs, weight=weight)}

    targets = X[:, :1] * 3
    arrays = (X, targets) if weight is None else (X, targets, weight)
    trainer = Explained(zoo.MLP((1,)), **OPTIONS)
    result = trainer.train_model(arrays, arrays, num_epochs=2)
    expected = sklearn_metrics.r2_score(targets, trainer.predict(arrays), sample_weight=weight)
    assert result.metrics["val/r2"] == pytest.approx(expected, abs=1e-5)
    assert "train/r2" not in result.metrics


def largest(self, outputs, batch, ctx):
    return {"largest": metrics.Max.per_example(jnp.abs(outputs).max(tuple(range(1, outputs.ndim))))}


@pytest.mark.slow_but("Autoencoder-model1-batch1")
@pytest.mark.parametrize(
    ("task", "model", "batch"),
    [
        (tasks.MultiLabelClassifier, zoo.MLP((2,)), (X[:8], (X[:8, :2] > 0).astype(np.int32))),
        (tasks.Autoencoder, zoo.MLP((4,)), {"x": X[:8]}),
        (
            tasks.LanguageModel,
            zoo.GPT(vocab_size=8, num_layers=1, num_heads=1, features=8, max_length=4),
            {"tokens": np.arange(40, dtype=np.int32).reshape(8, 5) % 8},
        ),
    ],
)
def test_every_task_has_the_metrics_of_its_subclass(task, model, batch):
    subclass = type("Subclass", (task,), {"extra_metrics": largest})
    trainer = subclass(model, **OPTIONS)
    trainer.train_model([batch], num_epochs=1)
    found = trainer.eval_model([batch])["largest"]
    assert found == pytest.approx(np.abs(trainer.predict([batch])).max(), rel=1e-6)

"""A classifier's labels: class indices, or the probability of each class."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff import tasks
from distaff.errors import BatchError, LossError

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
INDICES = np.arange(8, dtype=np.int32) % 3
ONE_HOT = np.eye(3, dtype=np.float32)[INDICES]


def classifier(**options: Any) -> tasks.Classifier:
    return tasks.Classifier(nn.Dense(3), root=None, enable_progress_bar=False, **options)


def trained(labels: Any, **options: Any) -> dict[str, float]:
    batch = {"x": X, "label": labels}
    run = classifier(optimizer=optax.sgd(0.1), **options)
    return run.train_model([batch] * 3, [batch], num_epochs=1).metrics


def test_one_hot_labels_are_class_indices():
    hard, soft = trained(INDICES), trained(ONE_HOT)
    assert soft == pytest.approx(hard, rel=1e-5)


def test_loss_is_the_mean_over_classes_and_the_likeliest_is_right():
    labels = 0.75 * ONE_HOT + 0.25 * np.roll(ONE_HOT, 1, axis=1)
    run = classifier()
    run._set_up({"x": X, "label": labels})
    logits = run.predict([{"x": X}])
    expected = -(labels * np.asarray(jax.nn.log_softmax(logits))).sum(axis=1).mean()
    metrics = run.eval_model([{"x": X, "label": labels}])
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert metrics["accuracy"] == (logits.argmax(axis=1) == INDICES).mean()


def test_labels_in_bfloat16_are_probabilities_though_they_do_not_add_up_to_one():
    labels = jnp.full((8, 3), 1 / 3, jnp.bfloat16)
    assert labels[0].sum(dtype=jnp.float32) != 1
    assert np.isfinite(trained(labels)["train/loss"])


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (
            2 * ONE_HOT,
            r"train loader, example 0 has the sum 2 and the minimum 0\. Divide",
        ),
        (ONE_HOT + np.eye(8, 3, dtype=np.float32), "example 0 has the sum 2"),
        (
            1.5 * ONE_HOT - 0.5 * np.roll(ONE_HOT, 1, axis=1),
            r"has the sum 1 and the minimum -0\.5",
        ),
    ],
)
def test_labels_that_are_no_probabilities_are_named(labels, words):
    with pytest.raises(BatchError, match=words):
        trained(labels)


def test_labels_that_are_no_probabilities_may_be_warned_of():
    with pytest.warns(UserWarning, match="has the sum 2|one is 2") as caught:
        trained(2 * ONE_HOT, on_bad_input="warn")
    loaders = [name for each in caught for name in ("train", "val") if name in str(each.message)]
    # Of each loader once before the run, with the sum, and once from its batches.
    assert loaders == ["train", "val", "val", "train"]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (ONE_HOT[:, :2], r"logits \(8, 3\) and labels \(8, 2\)"),
        (ONE_HOT.astype(np.int32), r"probabilities, float.*got int32 \(8, 3\)\. Cast"),
        (INDICES.astype(np.float32), r"class indices, int.*got float32 \(8,\)"),
        (INDICES[:, None], r"labels \(8, 1\)"),
    ],
)
def test_labels_of_another_form_are_refused(labels, words):
    with pytest.raises(LossError, match=words):
        trained(labels)


def test_class_out_of_range_is_still_named():
    with pytest.raises(BatchError, match="class indices from 0 to 2"):
        trained(INDICES + 1)

"""Limits: a value out of range, in whatever batch, ends the run with its batch and its name."""

from __future__ import annotations

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import distaff
from distaff import data, metrics, tasks
from distaff.errors import BatchError, ConfigError, LossError, NonFiniteError
from distaff.execution.dispatch.packed_metrics import MetricLayout
from distaff.metrics.limits import Limits, first_breach
from distaff.step.step import EvalStep

QUIET: dict[str, Any] = {"root": None, "enable_progress_bar": False}
LOGITS = (lambda key, *inputs: {"w": jnp.ones(())}, lambda p, x: p["w"] * x)
"""A model that returns its input."""

X = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
Y = np.arange(32, dtype=np.int32) % 3


def with_label(value: int, dtype: Any = np.int32, at: int = 21) -> np.ndarray:
    labels = Y.astype(dtype)
    labels[at] = value
    return labels


def loader(labels: np.ndarray, **leaves: Any) -> data.ArrayLoader:
    return data.ArrayLoader({"x": X, "y": labels, **leaves}, 8)


def limits(values: Any, *, where: Any = None, most: float | None = 2) -> Limits:
    declared = Limits.per_example("A rule", values, 0, most, where=where)
    reduced: Any = declared.reduce(jnp.ones(len(values), bool))
    return reduced


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.integers(-2, 4), min_size=2, max_size=2), min_size=1, max_size=6))
def test_merged_limits_are_of_the_first_batch_that_breaks_them(batches):
    each = [metrics.to_host({"x": limits(np.array(values, np.int32))}) for values in batches]
    merged = functools.reduce(metrics.merge, each)
    columns = MetricLayout(jax.eval_shape(lambda: {"x": limits(np.array(batches[0], np.int32))}))
    rows = np.stack([columns.row({"x": limits(np.array(v, np.int32))}) for v in batches])
    assert jax.tree.map(np.array_equal, metrics.merge_rows(columns.metrics(rows)), merged)["x"].ends
    bad = [n for n, values in enumerate(batches) if min(values) < 0 or max(values) > 2]
    breach = first_breach(merged)
    if not bad:
        assert breach is None
        return
    assert breach is not None
    assert breach.batch == bad[0]
    low, high = min(batches[bad[0]]), max(batches[bad[0]])
    assert f"one is {low if low < 0 else high}" in breach.found
    if low != high:
        assert f"from {low} to {high}" in breach.found


@pytest.mark.parametrize(
    ("values", "most", "found"),
    [
        (np.array([0.5, np.nan], np.float32), None, "one is nan"),
        (np.array([0.5, np.inf], np.float32), None, "one is inf"),
        (np.array([0.5, -0.25], np.float16), None, "one is -0.25"),
        (np.array([0, 2**31 - 1]), 2, "one is 2147483647"),
        (np.array([-(2**31), 0], np.int32), 2, "one is -2147483648"),
        (np.array([0, 255], np.uint8), 2, "one is 255"),
        (np.array([0, 7], np.uint32), 2, "one is 7"),
        (np.array([False, True]), None, ""),
    ],
)
def test_limits_of_every_dtype(values: np.ndarray, most: float | None, found: str):
    host = metrics.to_host({"x": limits(values, most=most)})
    breach = first_breach(host)
    assert (breach.found if breach else "").startswith(found)
    none = metrics.to_host({"x": limits(values, most=most, where=np.zeros(2, bool))})
    assert first_breach(none) is None
    empty = metrics.to_host({"x": host["x"].empty_like()})
    assert first_breach(metrics.merge(empty, host)) == breach
    assert metrics.compute(host) == {}


@pytest.mark.parametrize("options", [{}, {"steps_per_call": 4}, {"on_bad_numbers": "skip"}])
@pytest.mark.parametrize("value", [-1, 3])
@pytest.mark.slow
def test_label_out_of_range_in_a_later_batch_ends_a_training(value: int, options: Any):
    run = tasks.Classifier(LOGITS, **QUIET, **options)
    words = "A label ('y') is an index from 0 to 2; in batch 3 of epoch 1 of the train loader (s"
    with pytest.raises(BatchError, match=re.escape(words)) as error:
        run.train_model(loader(with_label(value)), num_epochs=2)
    assert f"one is {value}, and they range from {min(value, 0)} to {max(value, 2)}" in str(
        error.value
    )
    assert "ignore_index=label" in str(error.value)
    assert "learning rate" not in str(error.value)


def test_labels_are_checked_in_evaluation_and_on_the_device():
    run = tasks.Classifier(LOGITS, **QUIET, example_batch={"x": X[:8], "y": Y[:8]})
    unpadded = data.ArrayLoader({"x": X[:30], "y": with_label(200, np.uint8)[:30]}, 8)
    with pytest.raises(BatchError, match=r"in batch 3 of the val loader one is 200"):
        run.eval_model(unpadded, "val/")
    device = [{"x": jnp.asarray(X[i : i + 8]), "y": jnp.asarray(Y[i : i + 8])} for i in (0, 8)]
    device[1]["y"] = device[1]["y"].at[2].set(-100)
    with pytest.raises(BatchError, match=r"batch 2 of the evaluate loader one is -100"):
        run.eval_model(device)
    assert run.eval_model(device[:1])["loss"] > 0


def test_run_is_not_saved_with_a_batch_that_breaks_a_limit(tmp_path):
    run = tasks.Classifier(LOGITS, root=str(tmp_path), enable_progress_bar=False, save_every=1e-6)
    labels = with_label(-1, at=9)
    with pytest.raises(BatchError, match="in batch 2 of epoch 1"):
        run.train_model(loader(labels), num_epochs=1)
    assert run.last_run.checkpointer.store.latest() in (None, 1)


def test_warning_comes_once_for_each_loader_and_ignore_says_nothing(recwarn):
    labels = np.where(Y == 0, -1, Y)
    for policy, expected in (("warn", 1), ("ignore", 0)):
        run = tasks.Classifier(LOGITS, **QUIET, on_bad_input=policy)
        recwarn.clear()
        run.train_model(loader(labels), num_epochs=3)
        told = [str(each.message) for each in recwarn.list]
        assert len([text for text in told if text.startswith("A label ('y')")]) == expected


def test_soft_labels_of_a_later_batch_are_probabilities():
    soft = np.eye(3, dtype=np.float32)[Y]
    soft[21] = 2 * soft[21]
    with pytest.raises(BatchError, match=r"their sum is 1; in batch 3 of epoch 1.*one is 2"):
        tasks.Classifier(LOGITS, **QUIET).train_model(loader(soft), num_epochs=1)


@pytest.mark.parametrize("value", [-1, 11])
def test_token_out_of_range_in_a_later_batch_ends_training_and_prediction(value: int):
    tokens = np.arange(64, dtype=np.int32).reshape(16, 4) % 11
    tokens[9, 1] = value
    batches = data.ArrayLoader({"tokens": tokens}, 4)
    model = (
        lambda key, *inputs: {"w": jnp.zeros((11, 11))},
        lambda params, x: params["w"][x],
    )
    run = tasks.LanguageModel(model, **QUIET)
    with pytest.raises(BatchError, match=rf"A token \('tokens'\).*in batch 3 .*one is {value}"):
        run.train_model(batches, num_epochs=1)
    with pytest.raises(BatchError, match=rf"Tokens must be from 0 to 10.*predict loader.*{value}"):
        run.predict(batches)


@pytest.mark.parametrize("kind", [tasks.Classifier, tasks.Regressor])
def test_negative_token_of_a_model_with_an_embedding_is_out_of_range(kind: Any):
    tokens = np.arange(16, dtype=np.int32)[:, None] % 5
    model = (lambda key, *inputs: {"w": jnp.ones((5, 3))}, lambda p, x: p["w"][x[:, 0]])
    run = kind(model, **QUIET, example_batch={"tokens": tokens[:4], "y": Y[:4]})
    targets = Y[:16] if kind is tasks.Classifier else X[:16]
    assert run.eval_model(data.ArrayLoader({"tokens": tokens, "y": targets}, 4))["loss"] > 0
    tokens[9] = -1
    with pytest.raises(BatchError, match=r"A token \('tokens'\) .*in batch 3 .*one is -1"):
        run.eval_model(data.ArrayLoader({"tokens": tokens, "y": targets}, 4))


def test_loss_of_ones_own_has_its_indices_checked():
    class Lookup(distaff.TrainerModule):
        def loss_fn(self, params: Any, batch: Any, ctx: Any) -> Any:
            ctx.check_indices("place", batch["i"], 4)
            ctx.check_range("A share is at most 1", batch["s"], 0, 1, advice="Scale it.")
            return jnp.square(params["w"] * batch["s"])

    i, s = np.zeros(8, np.int32), np.zeros(8, np.float32)
    run = Lookup(LOGITS, **QUIET, example_batch={"x": s, "i": i, "s": s})
    i[5] = 4
    with pytest.raises(BatchError, match="A place is an index from 0 to 3; in batch 2 of"):
        run.eval_model(data.ArrayLoader({"i": i, "s": s}, 4))
    s[2] = 1.5
    with pytest.raises(BatchError, match=r"at most 1; in batch 1 .* from 0 to 1\.5\. Scale it\."):
        run.eval_model(data.ArrayLoader({"i": i, "s": s}, 4))


def test_indices_are_integers_and_where_has_their_shape():
    def step(values: Any, where: Any = None) -> Any:
        def loss(params: Any, batch: Any, ctx: Any) -> Any:
            ctx.check_indices("place", values, 4, where=where)
            return batch

        return EvalStep(loss)(distaff.TrainState.create(apply_fn=None, params={}), jnp.ones(2))

    with pytest.raises(LossError, match=r"Indices are integers; 'place' has dtype float32"):
        step(jnp.ones(2))
    with pytest.raises(LossError, match=r"the shape of the values, \(2,\); it has shape \(1,\)"):
        step(jnp.ones(2, int), jnp.ones(1, bool))


@pytest.mark.parametrize("value", [0.5, True, "pad", 2**31])
def test_ignore_index_is_a_whole_number(value: Any):
    with pytest.raises(ConfigError, match="ignore_index must be a 32-bit integer"):
        tasks.Classifier(LOGITS, ignore_index=value)


@pytest.mark.slow
def test_nan_of_an_index_out_of_range_says_so():
    class Embedder(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Embed(10, 3)(x)

    x = np.arange(16, dtype=np.int32) % 10
    x[13] = 12
    run = tasks.Classifier(Embedder(), optimizer=optax.sgd(0.1), **QUIET)
    with pytest.raises(NonFiniteError) as error:
        run.train_model(data.ArrayLoader({"x": x, "y": Y[:16]}, 4), num_epochs=1)
    text = str(error.value)
    assert "an index is out of range: indices span 2 to 12, but the axis has 10 ent" in text
    assert "Check the batch for indices" in text
    assert "learning rate" not in text

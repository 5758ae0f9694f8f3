"""Training and evaluation on packed rows and on buckets: the same as on each sequence alone."""

from __future__ import annotations

import signal
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distaff
from distaff import data, tasks
from distaff.errors import BatchError, RecompileError
from distaff.execution.compile import recompiles
from distaff.step.context import Context
from distaff.step.state import TrainState
from distaff.zoo import GPT

VOCAB = 17
MODEL = GPT(vocab_size=VOCAB, num_layers=1, num_heads=2, features=8, max_length=32)
RANDOM = np.random.default_rng(0)
DOCUMENTS = [
    RANDOM.integers(VOCAB, size=n, dtype=np.int32) for n in (3, 7, 2, 12, 5, 16, 9, 2, 4, 11)
]
SOME = DOCUMENTS[:4]
QUIET: Any = {"enable_progress_bar": False}


class Neighbours(nn.Module):
    """Tokens that look at all before them: quick to compile."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, 8)(tokens)
        return nn.Dense(VOCAB)(x + jnp.cumsum(x, axis=1))


NEIGHBOURS = Neighbours()


class Segmented(nn.Module):
    """The same within each segment."""

    @nn.compact
    def __call__(self, tokens, segment_ids):
        x = nn.Embed(VOCAB, 8)(tokens)
        seen = jnp.tril(segment_ids[:, :, None] == segment_ids[:, None, :])
        return nn.Dense(VOCAB)(x + seen @ x)


@pytest.fixture
def compiled(monkeypatch):
    """What is compiled, of all that is watched."""
    found: list[str] = []
    look = recompiles.Watched._check

    def looked(self: Any, args: Any, num_compiles: int) -> None:
        before = len(self._signatures)
        look(self, args, num_compiles)
        found.extend([self._what] * (len(self._signatures) - before))

    monkeypatch.setattr(recompiles.Watched, "_check", looked)
    return found


def trainer(model: Any = MODEL, **options: Any) -> tasks.LanguageModel:
    example = {"tokens": np.zeros((2, 9), np.int32)}
    options = {"root": None, "example_batch": example, **QUIET, **options}
    return tasks.LanguageModel(model, **options)


@pytest.fixture(scope="module")
def gpt() -> tasks.LanguageModel:
    return trainer(optimizer=optax.sgd(1.0))


@pytest.fixture(scope="module")
def params(gpt):
    # Large parameters, so that every part of the model tells in the logits.
    return jax.tree.map(lambda leaf: 10 * leaf if leaf.ndim == 2 else leaf, gpt.state.params)


def total_loss(gpt: tasks.LanguageModel, batches: list[Any]) -> Any:
    """The sum of the losses over all tokens that are predicted, as the task weighs them."""
    apply_fn = gpt.state.apply_fn

    def loss(params: Any) -> jax.Array:
        total = jnp.float32(0)
        for batch in batches:
            state = TrainState.create(apply_fn=apply_fn, params=params, tx=optax.sgd(1.0))
            per_row, _ = gpt.loss_fn(params, batch, Context(state, train=False))
            total += per_row.reduce(jnp.ones(len(batch["tokens"]), bool)).total
        return total

    return jax.jit(jax.value_and_grad(loss))


@pytest.fixture(scope="module")
def expected(gpt, params):
    alone = [{"tokens": tokens[None]} for tokens in SOME]
    return total_loss(gpt, alone)(params)


@pytest.mark.parametrize("kind", ["packed", "bucketed"])
@pytest.mark.slow
def test_loss_and_gradient_are_those_of_each_sequence_alone(gpt, params, expected, kind):
    batches = {
        "packed": lambda: data.packed(SOME, 16, 3),
        "bucketed": lambda: data.bucketed(SOME, (6, 12), 2, pad_value=5),
    }[kind]()
    actual = total_loss(gpt, list(batches))(params)
    assert expected[0] > 50
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()),
        actual,
        expected,
    )


@pytest.mark.slow
def test_packed_row_has_the_logits_of_its_sequences_and_none_reaches_another(gpt, params):
    (batch,) = data.packed(DOCUMENTS[:5], 30, 1)
    tokens, segments = batch["tokens"], batch["segment_ids"]
    apply = jax.jit(lambda *inputs: MODEL.apply({"params": params}, *inputs, train=False))
    logits = np.asarray(apply(tokens, segments))
    for number, document in enumerate(DOCUMENTS[:5], start=1):
        own = segments[0] == number
        np.testing.assert_array_equal(tokens[0][own], document)
        np.testing.assert_allclose(logits[0][own], apply(document[None])[0], rtol=1e-4, atol=1e-4)
        changed = np.where(own & (batch["positions"] == 0), (tokens + 1) % VOCAB, tokens)
        after = np.asarray(apply(changed, segments))
        np.testing.assert_array_equal(after[0][~own], logits[0][~own])
        assert (after[0][own] != logits[0][own]).any(axis=1).all()


def test_one_segment_is_no_segment(gpt, params):
    tokens = np.stack([DOCUMENTS[5], DOCUMENTS[5][::-1]])
    apply = jax.jit(lambda *inputs: MODEL.apply({"params": params}, *inputs, train=False))
    np.testing.assert_array_equal(apply(tokens), apply(tokens, np.ones_like(tokens)))


@pytest.mark.slow
def test_evaluation_is_exact_and_compiles_once_for_each_shape(compiled):
    alone = [{"tokens": tokens[None]} for tokens in SOME]
    expected = trainer(Neighbours(), recompile="ignore").eval_model(alone)
    del compiled[:]
    model = trainer(Neighbours(), recompile="error")
    assert model.eval_model(data.bucketed(SOME * 2, (4, 16), (3, 4)))["loss"] == pytest.approx(
        expected["loss"], rel=1e-5
    )
    assert compiled == ["the evaluation step"] * 2
    with pytest.raises(BatchError, match=r"\[\(3, 17\), \(15, 17\)\]"):
        model.predict(data.bucketed(SOME, (4, 16), 2))
    with pytest.raises(BatchError, match="second argument of Neighbours is not segment_ids"):
        model.eval_model(data.packed(DOCUMENTS, 20, 2))


def train(loader: Any, model: Any = NEIGHBOURS, num_epochs: int = 2, **options: Any) -> Any:
    run = trainer(model, optimizer=optax.adam(0.01), example_batch=None, **options)
    run.train_model(loader, num_epochs=num_epochs)
    return run


@pytest.mark.parametrize("steps_per_call", ["auto", 3])
@pytest.mark.slow
def test_training_compiles_one_program_for_each_bucket(steps_per_call, compiled):
    loader = data.bucketed(DOCUMENTS * 4, (4, 8, 16), (4, 3, 2), shuffle=True)
    options = {"recompile": "error", "steps_per_call": steps_per_call}
    train(loader, **options, num_epochs=3)
    what = "the fused steps" if steps_per_call == 3 else "the step"
    assert compiled == [what] * 3
    mapped = data.MappedLoader(loader, lambda batch: batch)
    train(mapped, **options, limit_batches=12)
    assert compiled == [what] * 6


@pytest.mark.slow
def test_short_batches_and_shapes_that_no_loader_declares_are_told():
    batches = list(data.bucketed(DOCUMENTS, (8, 16), 4, remainder="drop"))
    with pytest.raises(RecompileError, match=r"batch/tokens was int32\[4,8\], is int32\[4,16\]"):
        train(lambda: iter(batches), recompile="error", steps_per_call=1)
    train(batches, recompile="error", steps_per_call=1)  # those of a list are counted
    with pytest.raises(RecompileError, match="remainder='drop'"):
        train(data.bucketed(DOCUMENTS, (8, 16), 4), recompile="error", num_epochs=1)


class Interrupt(distaff.Callback):
    def on_step_end(self, info: Any) -> None:
        if info.step == 9:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow_but("packed")
@pytest.mark.parametrize("kind", ["packed", "bucketed"])
def test_run_resumes_within_an_epoch(kind, tmp_path):
    def run(**options: Any) -> Any:
        loader = {
            "packed": lambda: data.packed(DOCUMENTS * 3, 16, 2, shuffle=True, seed=1),
            "bucketed": lambda: data.bucketed(DOCUMENTS * 3, (4, 16), 2, shuffle=True, seed=1),
        }[kind]()
        model = {"packed": Segmented(), "bucketed": Neighbours()}[kind]
        return train(loader, model, steps_per_call=1, **options)

    straight = run()
    stored = {"root": str(tmp_path), "name": kind}
    assert run(callbacks=[Interrupt()], **stored).state.step == 9
    again = run(callbacks=[Interrupt()], **stored)
    assert again.state.step == straight.state.step > 12
    for left, right in zip(
        jax.tree.leaves(straight.state.params), jax.tree.leaves(again.state.params), strict=True
    ):
        assert left.tobytes() == right.tobytes()

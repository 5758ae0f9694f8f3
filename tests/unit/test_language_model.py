from __future__ import annotations

import math
from types import SimpleNamespace
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import distaff
from distaff import data, tasks
from distaff.callbacks import StepInfo
from distaff.errors import BatchError, ConfigError, LossError, StateError
from distaff.loggers import MemoryLogger
from distaff.tasks.language_model import _Samples
from distaff.zoo import GPT

TEXT = bytes(np.random.default_rng(0).integers(97, 123, 500, dtype=np.uint8))
LENGTH = 16


class Bigram(nn.Module):
    """The logits of the next token depend on the last one alone: quick to compile."""

    vocab_size: int = 256
    max_length: int = 64

    @nn.compact
    def __call__(self, tokens):
        return nn.Embed(self.vocab_size, self.vocab_size)(tokens)


class NoLogits(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Embed(7, 5)(tokens).sum(axis=1)


def _trainer(model=None, **options) -> tasks.LanguageModel:
    options = {"root": None, "enable_progress_bar": False, **options}
    example = {"tokens": np.zeros((2, LENGTH + 1), np.int32)}
    return tasks.LanguageModel(model or Bigram(), example_batch=example, **options)


@pytest.fixture(scope="module")
def gpt() -> tasks.LanguageModel:
    return _trainer(GPT(num_layers=1, num_heads=2, features=8, max_length=LENGTH))


def _bits(trainer, text: bytes) -> np.ndarray:
    """The code length of each byte in bits, under a bigram model; the first follows a zero."""
    stream = np.frombuffer(b"\0" + text, np.uint8)
    table = np.asarray(trainer.state.params["Embed_0"]["embedding"], np.float64)
    log_probabilities = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
    return -log_probabilities[stream[:-1], stream[1:]] / math.log(2)


def test_language_model_averages_over_every_byte_of_the_held_out_text():
    trainer = _trainer()
    bits = _bits(trainer, TEXT)
    for stride in (None, 5):
        for batch_size in (4, 7):
            loader = data.held_out_windows(TEXT, LENGTH, batch_size, stride=stride)
            metrics = trainer.eval_model(loader, "test/")
            assert metrics["test/bits_per_byte"] == pytest.approx(bits.mean(), rel=1e-5)
            assert metrics["test/loss"] == pytest.approx(bits.mean() * math.log(2), rel=1e-5)
            assert metrics["test/perplexity"] == pytest.approx(2 ** bits.mean(), rel=1e-4)


def test_language_model_counts_what_the_mask_tells():
    trainer = _trainer()
    bits = _bits(trainer, TEXT[:8])
    tokens = np.frombuffer(b"\0" + TEXT[:8], np.uint8).astype(np.int32)
    mask = np.array([[1, 0, 0, 0], [0, 1, 1, 1]], bool)
    batch = {"tokens": np.stack([tokens[:5], tokens[4:]]), "mask": mask}
    metrics = trainer.eval_model([batch])
    assert metrics["bits_per_byte"] == pytest.approx(bits[[0, 5, 6, 7]].mean(), rel=1e-5)
    batch["mask"] = np.array([[1, 1, 0, 0], [0, 0, 0, 0]], bool)
    assert trainer.eval_model([batch])["bits_per_byte"] == pytest.approx(bits[:2].mean(), rel=1e-5)


@pytest.mark.slow
def test_language_model_trains_on_the_mean_over_the_masked_tokens():
    trainer = _trainer(optimizer=optax.sgd(1.0))
    tokens = np.random.default_rng(1).integers(256, size=(2, 5), dtype=np.int32)
    mask = np.array([[1, 1, 1, 0], [0, 0, 0, 1]], bool)

    def mean(params):
        logits = trainer.state.apply_fn({"params": params}, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return (losses * mask).sum() / 4

    before = jax.tree.map(jnp.copy, trainer.state.params)
    trainer.train_model([{"tokens": tokens, "mask": mask}], num_epochs=1)
    expected = jax.tree.map(lambda p, g: p - g, before, jax.grad(mean)(before))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        trainer.state.params,
        expected,
    )


@pytest.mark.slow
def test_language_model_learns_and_keeps_the_lowest_loss(tmp_path):
    text = b"abcdefgh" * 40
    trainer = _trainer(
        optimizer=distaff.OptimizerConfig("adam", learning_rate=0.3),
        root=str(tmp_path),
        name="alphabet",
    )
    train = data.shuffled_windows(text, 8, batch_size=4)
    held_out = data.held_out_windows(text, 8, batch_size=4)
    result = trainer.train_model(train, held_out, held_out, num_epochs=5)
    assert trainer.monitor == distaff.Monitor("val/loss", mode="min")
    assert result.metrics["test/bits_per_byte"] < 0.1
    assert trainer.sample(b"cd", 9, temperature=0) == b"cdefghabcde"
    loaded = tasks.LanguageModel.load_from_checkpoint(result.path)
    assert loaded.eval_model(held_out) == trainer.eval_model(held_out)
    assert loaded.sample(b"cd", 9, temperature=0) == b"cdefghabcde"


def test_language_model_takes_arrays_and_names_bits_by_the_vocabulary():
    tokens = np.random.default_rng(1).integers(7, size=(3, 5), dtype=np.int32)
    trainer = _trainer(Bigram(vocab_size=7))
    by_array, by_dict = trainer.eval_model([tokens]), trainer.eval_model([{"tokens": tokens}])
    assert set(by_array) == {"loss", "bits_per_token", "perplexity"}
    assert by_array == by_dict
    assert trainer.predict([tokens]).shape == (3, 4, 7)


@pytest.mark.slow
def test_sample_has_the_form_of_the_prompt(gpt):
    prompt = np.array([[3, 4, 5], [6, 7, 8]])
    both, one = gpt.sample(prompt, 20), gpt.sample(prompt[0], 20)
    assert both.shape == (2, 23)
    assert one.shape == (23,)
    assert both.dtype == one.dtype == np.int32
    np.testing.assert_array_equal(both[:, :3], prompt)
    text = gpt.sample(b"def ", 30)
    assert isinstance(text, bytes)
    assert (len(text), text[:4]) == (34, b"def ")


@pytest.mark.slow
def test_sample_depends_on_seed_and_temperature(gpt):
    assert gpt.sample(b"a", 25, seed=1) == gpt.sample(b"a", 25, seed=1)
    assert gpt.sample(b"a", 25, seed=1) != gpt.sample(b"a", 25, seed=2)
    cold = gpt.sample(b"a", 25, temperature=0, seed=1)
    assert cold == gpt.sample(b"a", 25, temperature=0, seed=2)
    expected = list(b"a")
    for _ in range(25):
        seen = expected[-LENGTH:]
        window = np.array([seen + [0] * (LENGTH + 1 - len(seen))], np.int32)
        expected.append(int(gpt.predict([window])[0, len(seen) - 1].argmax()))
    assert cold == bytes(expected)


@pytest.mark.slow
def test_sample_compiles_once_for_a_length(gpt):
    gpt.sample(b"abc", 13)
    size = gpt._workspace.program("fill", None)._cache_size()
    gpt.sample(b"abcdef", 10, temperature=0.5, seed=3)
    assert gpt._workspace.program("fill", None)._cache_size() == size


def test_sample_uses_the_parameters_of_evaluation():
    optimizer = optax.contrib.schedule_free_sgd(learning_rate=3.0)
    trainer = _trainer(optimizer=optimizer)
    train = data.shuffled_windows(TEXT, LENGTH, batch_size=4)
    trainer.train_model(train, num_epochs=2)
    state = trainer.evaluation_state()
    logits = state.apply_fn({"params": state.params}, np.arange(97, 123)[:, None])[:, 0]
    for letter in range(26):
        sampled = trainer.sample(bytes([97 + letter]), 1, temperature=0)
        assert sampled[1] == int(logits[letter].argmax())


@pytest.mark.slow
def test_samples_are_written_every_n_steps(tmp_path):
    memory = MemoryLogger()
    trainer = _trainer(
        root=str(tmp_path),
        name="samples",
        loggers=[memory],
        sample_every_n_steps=4,
        sample_prompt="é",
        sample_length=10,
    )
    train = data.shuffled_windows(TEXT, LENGTH, batch_size=3)
    result = trainer.train_model(train, num_epochs=1)
    assert result.step == 10
    files = sorted((result.path / "texts").iterdir())
    assert [file.name for file in files] == ["sample_4.txt", "sample_8.txt"]
    assert all(file.read_text().startswith("é") for file in files)
    assert not _trainer().callbacks.watches_steps
    again = trainer.train_model(train, num_epochs=1)
    assert sorted(file.name for file in (again.path / "texts").iterdir()) == [
        "sample_12.txt",
        "sample_16.txt",
        "sample_20.txt",
    ]


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(0, 10_000), st.integers(0, 600))
def test_a_sample_is_due_at_each_multiple_of_its_steps_and_at_no_other(every, start, num_steps):
    steps = range(start + 1, start + num_steps + 1)
    due: list[int] = []
    logger = SimpleNamespace(log_text=lambda name, text, step: due.append(step))
    config = SimpleNamespace(
        sample_every_n_steps=every, sample_prompt="a", sample_length=1, temperature=1.0
    )
    trainer = SimpleNamespace(
        config=config, sample=lambda *_, **__: b"", last_run=SimpleNamespace(logger=logger)
    )
    samples = _Samples(cast("tasks.LanguageModel", trainer))
    samples.on_training_start(StepInfo(start, 1, None, {}))
    for step in steps:
        samples.on_step_end(StepInfo(step, 1, None, {}))
    assert due == [step for step in steps if step in range(0, start + num_steps + 1, every)]


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (np.zeros((2, 3), np.float32), "int dtype.*float32"),
        (np.zeros(3, np.int32), r"shape \(3,\)"),
        ({"tokens": np.zeros((2, 1), np.int32)}, "at least two"),
        ({"label": np.zeros((2, 3), np.int32)}, "model's input"),
    ],
)
def test_language_model_refuses_batches(batch, match):
    with pytest.raises(BatchError, match=match):
        tasks.LanguageModel(Bigram(), example_batch=batch, enable_progress_bar=False)


def test_language_model_refuses_other_outputs_and_masks():
    tokens = np.zeros((2, 5), np.int32)
    with pytest.raises(LossError, match=r"logits \(2, 5\)"):
        _trainer(NoLogits()).eval_model([tokens])
    with pytest.raises(LossError, match=r"mask \(2, 3\)"):
        _trainer().eval_model([{"tokens": tokens, "mask": np.ones((2, 3), bool)}])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"prompt": "text"}, r"encode\(\)"),
        ({"prompt": b""}, "at least one"),
        ({"prompt": np.zeros((1, 2, 3), int)}, r"\(1, 2, 3\)"),
        ({"prompt": np.zeros(3)}, "float64"),
        ({"prompt": np.array([3, 256])}, "vocab_size=256.*from 3 to 256"),
        ({"prompt": np.array([-1])}, "from -1"),
        ({"length": 0}, "length must be an integer"),
        ({"temperature": -0.5}, "temperature.*-0.5"),
        ({"temperature": math.inf}, "temperature.*inf"),
    ],
)
def test_sample_refuses(gpt, arguments, match):
    with pytest.raises(ConfigError, match=match):
        gpt.sample(**{"prompt": b"a", "length": 3, **arguments})


def test_sample_needs_parameters_and_bytes_a_vocabulary_of_bytes():
    with pytest.raises(StateError, match="no parameters"):
        tasks.LanguageModel(Bigram()).sample(b"a", 3)
    with pytest.raises(ConfigError, match="vocab_size=7"):
        _trainer(Bigram(vocab_size=7)).sample(b"a", 3)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sample_every_n_steps": 0}, "sample_every_n_steps must be an integer"),
        ({"sample_length": 0}, "sample_length"),
        ({"sample_prompt": ""}, "sample_prompt"),
        ({"temperature": -1}, "temperature"),
        ({"sample_every_n_step": 5}, "sample_every_n_steps"),
        ({"sample_every_n_steps": 5, "model": Bigram(vocab_size=7)}, "vocab_size=7"),
    ],
)
def test_language_model_refuses_options(options, match):
    model = options.pop("model", Bigram())
    with pytest.raises(ConfigError, match=match):
        tasks.LanguageModel(model, **options)

"""Language modelling: models that predict every token from the tokens before it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distaff.callbacks import Callback, StepInfo
from distaff.core.config.checks import is_zero, whole
from distaff.core.config.options import at_least, described, option, or_none
from distaff.core.typing import Batch, Key, Params
from distaff.data.inspection import unknown_tokens
from distaff.errors import BatchError, ConfigError, LossError
from distaff.metrics import Mean, Perplexity
from distaff.metrics.accumulators import aligned, floating
from distaff.metrics.monitor import Monitor
from distaff.models import Lora
from distaff.models.flags import parameters
from distaff.run.sanity import report
from distaff.step.context import Context
from distaff.step.state import TrainState
from distaff.tasks.cross_entropy import fraction, smoothed
from distaff.tasks.weighing import (
    WeighingTask,
    check_weights,
    ignored_index,
    weights_for,
    with_entry_name,
)
from distaff.trainer.config import TrainerConfig
from distaff.zoo.sampling import generate

_NATS_PER_BIT = math.log(2)
_BYTES = 256
_ADVICE = (
    "Give the model the vocab_size of the tokenizer, and pad with a token that it has, or ignore "
    "one: ignore_index=token."
)


def _prompt(name: str, value: Any) -> str:
    """Checks that an option is a text."""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} must be a non-empty str; got {value!r}.")
    return value


def _temperature(name: str, value: Any) -> Any:
    """Checks that an option is a finite number of at least 0."""
    if not isinstance(value, Real) or not 0 <= value < math.inf:
        raise ConfigError(f"{name} must be a finite number >= 0; got {value!r}.")
    return value


@described
@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(TrainerConfig):
    """The options of a `LanguageModel`, in addition to `TrainerConfig`.

    Raises:
        ConfigError: an option is out of its range.
    """

    ignore_index: int | None = option(
        None,
        """A token that is not predicted, such as a padding token, or -100; None to disable. If the
        model does not have the token, such as -100, its input is the token 0 instead: to hide a
        prompt from the loss but not from the model, use `mask`.""",
        check=or_none(ignored_index),
    )
    label_smoothing: float = option(
        0.0,
        """Probability, in [0, 1), that is taken from each token and spread evenly over all tokens,
        in the loss; 0 to disable. Perplexity and bits ignore it.""",
        check=fraction,
        traced="always",
    )
    sample_every_n_steps: int | None = option(
        None,
        """Steps between samples, which are logged as the text `sample`; None to disable. Tokens
        are decoded as UTF-8 bytes.""",
        check=or_none(at_least(1)),
    )
    sample_prompt: str = option("\n", "Beginning of a sample.", check=_prompt)
    sample_length: int = option(400, "Number of tokens to sample.", check=at_least(1))
    temperature: float = option(
        1.0, "Temperature of the samples; see `LanguageModel.sample`.", check=_temperature
    )


class LanguageModel(WeighingTask):
    """Trains a causal model of tokens, `[batch, length] -> logits [batch, length, vocab]`.

    Batches are dicts with `tokens`, int `[batch, length + 1]`, or such an array alone; each token
    after the first is predicted from the tokens before it. A dict may also hold:

    * `mask`, `[batch, length]`, bool or weights of `tokens[:, 1:]`; or `[batch, length + 1]` for
      all tokens, as from `data.bucketed`;
    * `sample_weight`, of these shapes or `[batch]`;
    * `segment_ids`, int `[batch, length + 1]`, as from `data.packed`. No token is then predicted
      from another segment, and `segment_ids`, `[batch, length]`, are the model's second argument.

    All averages are per token, exact over weights and uneven batches. A token that the model does
    not have raises an error, in any batch. The best model is the one with the lowest `val/loss`.
    `predict` returns the logits of `tokens[:, 1:]`.

    Args:
        model: the model, as for `TrainerModule`, whose other arguments apply too. Its attribute
            `max_length`, if any, limits the tokens that a sample depends on.
        **options: options of `LanguageModelConfig`, such as `sample_every_n_steps=1000`.
    """

    Config = LanguageModelConfig
    config: LanguageModelConfig
    monitor = Monitor("val/loss", mode="min")

    def __init__(self, model: Any, *, callbacks: Iterable[Callback] = (), **options: Any) -> None:
        # A callback only if needed: steps without callbacks are faster.
        samples = (_Samples(self),) if options.get("sample_every_n_steps") else ()
        super().__init__(model, callbacks=(*callbacks, *samples), **options)
        if samples:
            _as_tokens(self.config.sample_prompt.encode(), self._vocab_size)

    @property
    def _module(self) -> Any:
        module = self.model.module
        return module.module if isinstance(module, Lora) else module

    @property
    def _vocab_size(self) -> int | None:
        return getattr(self._module, "vocab_size", None)

    def tokens(self, batch: Batch) -> jax.Array:
        """Returns the tokens of a batch, int `[batch, length + 1]`. Override it for other batches.

        Raises:
            BatchError: no tokens are found, or they have another dtype or shape.
        """
        (tokens,) = super().model_inputs(batch)
        if np.ndim(tokens) != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise BatchError(
                "A LanguageModel's batches must hold tokens [batch, length + 1] of an int dtype; "
                f"got shape {np.shape(tokens)} and dtype {tokens.dtype}."
            )
        if tokens.shape[1] < 2:
            raise BatchError(
                "A LanguageModel predicts each token after the first, so it needs at least two per "
                f"row; got tokens of shape {tokens.shape}."
            )
        return tokens

    def check_batch(self, batch: Batch, name: str) -> None:
        """Checks the first batch of a loader; see `TrainerModule`.

        Raises:
            BatchError: also for tokens that the model does not have, unless a subclass overrides
                `loss_fn`.
        """
        super().check_batch(batch, name)
        if type(self).loss_fn is LanguageModel.loss_fn:
            self._check_tokens(batch, name)

    def _check_tokens(self, batch: Batch, name: str) -> None:
        tokens, vocab_size = np.asarray(self.tokens(batch)), self.num_outputs(batch)
        if vocab_size is not None:
            ignored = self.config.ignore_index
            known = tokens if ignored is None else np.where(tokens == ignored, 0, tokens)
            report(unknown_tokens(known, vocab_size, name), self.config)

    def _pass(self, loader: Any, name: str) -> Iterator[Batch]:
        for batch in super()._pass(loader, name):
            self._check_tokens(batch, name)
            yield batch

    def mask(self, batch: Batch) -> jax.Array | None:
        """Returns the mask or weights of `tokens[:, 1:]`, `[batch, length]`, or None."""
        if not isinstance(batch, Mapping):
            return None
        mask, segments = batch.get("mask"), batch.get("segment_ids")
        if mask is not None and mask.shape == self.tokens(batch).shape:
            mask = mask[:, 1:]
        if segments is None:
            return mask
        is_inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        return is_inside if mask is None else jnp.where(is_inside, mask, jnp.zeros_like(mask))

    def count_tokens(self, batch: Batch) -> int:
        """Returns the number of tokens that count in the loss: predicted, and with a weight.

        A run that ends, validates or saves after a number of tokens calls it on the host. Override
        it for another definition.

        Args:
            batch: a batch of NumPy arrays.
        """
        tokens = np.asarray(self.tokens(batch))
        is_counted = tokens[:, 1:] != self.config.ignore_index
        for weight in (self.mask(batch), self.sample_weight(batch)):
            if weight is not None:
                weight = np.asarray(weight)
                weight = weight[:, 1:] if weight.shape == tokens.shape else weight
                is_counted &= (weight != 0).reshape(*weight.shape, *(1,) * (2 - weight.ndim))
        return int(np.count_nonzero(is_counted))

    def model_inputs(self, batch: Batch) -> tuple[Any, ...]:
        """Returns all tokens but the last, which is only predicted, and their segments if any.

        Raises:
            BatchError: the batch has `segment_ids` that the model does not accept, or that differ
                from the tokens in shape.
        """
        tokens, ignored = self.tokens(batch), self.config.ignore_index
        if ignored is not None and not 0 <= ignored < (self._vocab_size or math.inf):
            tokens = jnp.asarray(tokens).astype(jnp.int32)
            tokens = jnp.where(tokens == ignored, 0, tokens)
        segments = batch.get("segment_ids") if isinstance(batch, Mapping) else None
        if segments is None:
            return (tokens[:, :-1],)
        if segments.shape != tokens.shape:
            raise BatchError(
                "Packed batches need a segment id for each token; got segment_ids of shape "
                f"{segments.shape} for tokens of shape {tokens.shape}."
            )
        if parameters(self._module)[1:2] != ["segment_ids"]:
            raise BatchError(
                "The batches are packed, but the model would mix the sequences of a row: the "
                f"second argument of {type(self.model.module).__name__} is not segment_ids. Use a "
                "model of (tokens, segment_ids), such as zoo.GPT, or data.bucketed instead of "
                "data.packed."
            )
        return tokens[:, :-1], segments[:, :-1]

    def loss_fn(self, params: Params, batch: Batch, ctx: Context) -> Any:
        """Returns each row's mean cross-entropy per token, in nats, and metrics.

        The metrics are `perplexity`, and the negative log-likelihood in bits: `bits_per_byte` for a
        vocabulary of 256 tokens, `bits_per_token` otherwise.

        Raises:
            LossError: the model's outputs or the mask have another shape.
        """
        logits = ctx.apply(params, *self.model_inputs(batch))
        tokens = jnp.asarray(self.tokens(batch)).astype(jnp.int32)
        targets, mask = tokens[:, 1:], self.mask(batch)
        mask = jnp.ones(targets.shape, bool) if mask is None else mask
        if logits.ndim != 3 or logits.shape[:2] != targets.shape or mask.shape != targets.shape:
            raise LossError(
                "A LanguageModel's model must return logits [batch, length, vocab] for tokens "
                "[batch, length + 1], and a mask must be [batch, length]; got logits "
                f"{logits.shape}, tokens {self.tokens(batch).shape} and mask {mask.shape}."
            )
        weight = self._weight(batch, tokens, mask, ctx)
        ignored = self.config.ignore_index
        is_known = jnp.ones(tokens.shape, bool) if ignored is None else tokens != ignored
        what = with_entry_name("token", self.tokens(batch), batch)
        ctx.check_indices(what, tokens, logits.shape[-1], where=is_known, advice=_ADVICE)
        logits, smoothing = floating(logits), self.config.label_smoothing
        known = jnp.where(is_known[:, 1:], targets, 0)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, known)
        counts = weight.sum(axis=1)
        nats = objective = _per_token(losses, weight, counts)
        if not is_zero(smoothing):
            objective = _per_token(smoothed(losses, logits, smoothing), weight, counts)
        bits = "bits_per_byte" if logits.shape[-1] == _BYTES else "bits_per_token"
        return Mean.per_example(objective, weight=counts), {
            bits: Mean.per_example(nats / _NATS_PER_BIT, weight=counts),
            "perplexity": Perplexity.per_example(nats, weight=counts),
            **self.extra_metrics(logits, batch, ctx),
        }

    def _weight(self, batch: Batch, tokens: Any, mask: Any, ctx: Context) -> jax.Array:
        """Returns the weights of `tokens[:, 1:]`, float `[batch, length]`."""
        mask, sample_weight = jnp.asarray(mask), self.sample_weight(batch)
        if mask.dtype != bool:
            check_weights("mask", mask, ctx)
        weight = floating(mask)
        if sample_weight is not None:
            if np.shape(sample_weight) == tokens.shape:
                sample_weight = sample_weight[:, 1:]
            weight = weight * aligned(weights_for(sample_weight, weight.shape, ctx), weight)
        if self.config.ignore_index is not None:
            weight = jnp.where(tokens[:, 1:] == self.config.ignore_index, 0, weight)
        return weight

    def sample_weight(self, batch: Batch) -> Any:
        """Returns the weights of a batch, `[batch]`, `[batch, length]` or `[batch, length + 1]`.

        None for equal weights, and for a batch that is not a dict. See also `mask`.
        """
        return super().sample_weight(batch) if isinstance(batch, Mapping) else None

    def sample(
        self,
        prompt: Any,
        length: int,
        *,
        temperature: float = 1.0,
        seed: int = 0,
        weights: str | None = None,
    ) -> Any:
        """Samples a continuation of a prompt, with the parameters for evaluation.

        Args:
            prompt: bytes, or tokens int `[length]` or `[batch, length]`; at least one.
            length: number of tokens to sample.
            temperature: divisor of the logits: below 1, likely tokens become more likely; 0 always
                picks the most likely one.
            seed: random seed.
            weights: see `evaluation_state`.

        Returns:
            The prompt and its continuation, with the type of the prompt.

        Raises:
            StateError: the model has no parameters yet.
            ConfigError: the prompt is empty or has invalid tokens, or an option is out of its
                range.
        """
        whole("length", length)
        _temperature("temperature", temperature)
        prompt_tokens = _as_tokens(prompt, self._vocab_size)
        rows = np.atleast_2d(prompt_tokens)
        buffer = np.pad(rows, ((0, 0), (0, length)))
        max_length = getattr(self._module, "max_length", None)

        def fill(
            state: TrainState, tokens: jax.Array, start: int, temperature: float, key: Key
        ) -> jax.Array:
            def logits_fn(tokens: jax.Array) -> jax.Array:
                return Context(state, train=False).apply(state.params, tokens)

            return generate(
                logits_fn, tokens, start, key=key, temperature=temperature, max_length=max_length
            )

        filled = self._workspace.program("fill", fill)(
            self.evaluation_state(weights),
            jnp.asarray(buffer),
            rows.shape[1],
            jnp.float32(temperature),
            jax.random.key(seed),
        )
        tokens = np.asarray(filled).reshape(*prompt_tokens.shape[:-1], -1)
        return tokens.astype(np.uint8).tobytes() if isinstance(prompt, bytes) else tokens


def _per_token(losses: jax.Array, weight: jax.Array, counts: jax.Array) -> jax.Array:
    """Returns each row's weighted mean, `[batch]`, given the sums of its weights."""
    total = (jnp.where(weight != 0, losses, 0) * weight).sum(axis=1)
    return total / jnp.where(counts == 0, 1, counts)


class _Samples(Callback):
    """Logs a sample every `sample_every_n_steps` steps."""

    def __init__(self, trainer: LanguageModel) -> None:
        self._trainer = trainer

    def on_step_end(self, info: StepInfo) -> None:
        config = self._trainer.config
        every = config.sample_every_n_steps
        if every is None or info.step % every:
            return
        text = self._trainer.sample(
            config.sample_prompt.encode(), config.sample_length, temperature=config.temperature
        )
        logger = self._trainer.last_run.logger
        logger.log_text("sample", text.decode(errors="replace"), step=info.step)


def _as_tokens(prompt: Any, vocab_size: int | None) -> np.ndarray:
    if isinstance(prompt, str):
        raise ConfigError("A prompt must be bytes or tokens, not str. Write prompt.encode().")
    is_bytes = isinstance(prompt, bytes)
    tokens: Any = np.frombuffer(prompt, np.uint8) if is_bytes else np.asarray(prompt)
    if tokens.ndim not in (1, 2) or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise ConfigError(
            "A prompt must be bytes, or tokens int [length] or [batch, length], at least one; got "
            f"{type(prompt).__name__} of shape {tokens.shape} and dtype {tokens.dtype}. "
            "To start at the beginning of a text, pass b'\\n'."
        )
    if isinstance(prompt, bytes) and vocab_size not in (None, _BYTES):
        raise ConfigError(
            f"A prompt in bytes needs a model of {_BYTES} tokens; this one has "
            f"vocab_size={vocab_size}. Pass tokens, an int array."
        )
    if tokens.min() < 0 or (vocab_size is not None and tokens.max() >= vocab_size):
        raise ConfigError(
            f"Tokens must be at least 0 and less than vocab_size={vocab_size}; the prompt has "
            f"tokens from {tokens.min()} to {tokens.max()}."
        )
    return tokens.astype(np.int32)

"""Sampling of continuations from a language model."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from distaff.core.typing import Key
from distaff.metrics import floating


def generate(
    logits_fn: Callable[[jax.Array], jax.Array],
    tokens: jax.Array,
    start: jax.typing.ArrayLike,
    *,
    key: Key,
    temperature: jax.typing.ArrayLike = 1.0,
    max_length: int | None = None,
) -> jax.Array:
    """Fills a buffer with sampled tokens, each conditioned on the tokens before it.

    The buffer keeps its size, so under `jax.jit` one program serves every `start`, `key` and
    `temperature`. Each token costs a full forward pass over the window before it.

    Args:
        logits_fn: a causal model, int `[batch, length]` -> logits `[batch, length, vocab]`.
        tokens: int `[batch, length]`; the first `start` of each row are the prompt, the others are
            overwritten.
        start: length of the prompt, int, at least 1.
        key: random key; each position folds in its index.
        temperature: divisor of the logits; 0 picks the most likely token.
        max_length: maximum number of tokens for `logits_fn`; None for any number.

    Returns:
        The filled buffer, as `tokens`.
    """
    length = tokens.shape[1]
    window = length if max_length is None else min(max_length, length)

    def fill(position: jax.Array, tokens: jax.Array) -> jax.Array:
        first = jnp.maximum(position - window, 0)
        # The logits in use do not depend on the buffer at and after `position`.
        logits = logits_fn(jax.lax.dynamic_slice_in_dim(tokens, first, window, axis=1))
        last = jax.lax.dynamic_index_in_dim(logits, position - 1 - first, axis=1, keepdims=False)
        drawn = _draw(jax.random.fold_in(key, position), last, temperature)
        return tokens.at[:, position].set(drawn.astype(tokens.dtype))

    return jax.lax.fori_loop(start, length, fill, tokens)


def _draw(key: Key, logits: jax.Array, temperature: jax.typing.ArrayLike) -> jax.Array:
    logits = floating(logits)  # half precision would round the noise itself
    is_greedy = jnp.asarray(temperature) == 0
    drawn = jax.random.categorical(key, logits / jnp.where(is_greedy, 1, temperature))
    return jnp.where(is_greedy, logits.argmax(axis=-1), drawn)

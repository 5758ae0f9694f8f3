"""Causal attention: our own, JAX's, or a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from distaff.core.config.options import check_choice
from distaff.errors import ConfigError
from distaff.metrics import floating

AttentionName: TypeAlias = Literal["xla", "cudnn"]

Attention: TypeAlias = AttentionName | Callable[..., jax.Array] | None
"""How queries attend to keys: by name, by a function, or by `causal_attention`."""

_RUNS = 4


def check_attention(attention: Attention) -> None:
    """Checks that an attention is known, and that the backend has it.

    Raises:
        ConfigError: it is unknown, or the backend does not have it.
    """
    if attention is None or callable(attention):
        return
    check_choice("attention", attention, AttentionName)
    if attention == "cudnn" and jax.default_backend() != "gpu":
        raise ConfigError(
            "attention='cudnn' needs an NVIDIA GPU; JAX runs on the backend "
            f"{jax.default_backend()!r}. Pass attention='xla', or attention=None."
        )


def attend(
    attention: Attention,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Returns the results of an attention; see `causal_attention` for the arguments."""
    if attention is None:
        return causal_attention(query, key, value, segment_ids)
    if callable(attention):
        return attention(query, key, value, segment_ids)
    mask = None
    if segment_ids is not None:
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    dtype = value.dtype
    if attention == "cudnn" and dtype == jnp.float32:  # It has no kernels for float32.
        query, key, value = (x.astype(jnp.bfloat16) for x in (query, key, value))
    outputs = jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=True, implementation=attention
    )
    return outputs.astype(dtype)


def causal_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
    """Attends from each position to itself and the positions before it.

    Queries are split into four runs, each attending to the keys up to its end: three eighths of the
    scores, which the mask would set to zero, are never computed.

    Args:
        query: `[batch, length, heads, features]`.
        key: as `query`.
        value: as `query`.
        segment_ids: int `[batch, length]`; a position attends only to positions of its own segment.
            By default there is one segment.

    Returns:
        As `query`: means of the values, weighted by the softmax of scaled dot products.
    """
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    query, length = query * query.shape[-1] ** -0.5, query.shape[2]
    run, outputs = -(-length // _RUNS), []
    for start in range(0, length, run):
        end = min(start + run, length)
        visible = jnp.tril(jnp.ones((1, 1, end - start, end), bool), k=start)
        if segment_ids is not None:
            of_queries, of_keys = segment_ids[:, start:end], segment_ids[:, :end]
            visible &= (of_queries[:, :, None] == of_keys[:, None, :])[:, None]
        scores = query[:, :, start:end] @ jnp.swapaxes(key[:, :, :end], 2, 3)
        weights = jax.nn.softmax(jnp.where(visible, floating(scores), -jnp.inf))
        outputs.append(weights.astype(value.dtype) @ value[:, :, :end])
    return jnp.swapaxes(jnp.concatenate(outputs, axis=2), 1, 2)

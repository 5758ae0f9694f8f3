"""A small GPT: a causal transformer over tokens."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from distaff.core.config.options import traced
from distaff.errors import BatchError, ConfigError
from distaff.zoo.attention import Attention, attend, check_attention
from distaff.zoo.attention import causal_attention as causal_attention  # its name here stays

_INIT_SCALE = 0.02


class GPT(nn.Module):
    """A decoder-only transformer, which predicts every token from the tokens before it.

    Pre-norm blocks of causal attention and a GELU MLP four times as wide, initialised as GPT-2
    (Radford et al. 2019): normal with standard deviation 0.02, divided by `sqrt(2 * num_layers)`
    for kernels that write into the residual stream. Positions are rotary (Su et al. 2021,
    arXiv:2104.09864), norms are RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467), linear layers
    have no biases (PaLM, Chowdhery et al. 2022, arXiv:2204.02311), and the token embedding is not
    tied to the last layer. The number of parameters is
    `2 * vocab_size * features + num_layers * (12 * features ** 2 + 2 * features) + features`:
    853,120 by default.

    Attributes:
        vocab_size: number of different tokens; 256 for bytes.
        num_layers: number of blocks.
        num_heads: attention heads of a block; `features / num_heads` must be an even integer.
        features: width of the residual stream.
        max_length: maximum length of an input.
        dropout: dropout rate in `[0, 1]` of the embedding, and of the output of each half of a
            block.
        scan_layers: whether the blocks run as a loop, so that the program contains one block
            whatever `num_layers`, and compiles as fast. Their parameters are then stacked,
            `[num_layers, ...]`, below `blocks` instead of `Block_0`, `Block_1`, ...;
            `distaff.zoo.stacked_blocks` converts them.
        attention: None for `causal_attention`; `"xla"` or `"cudnn"` for this implementation of
            `jax.nn.dot_product_attention`, where cuDNN computes in bfloat16 on a GPU; or a function
            with the arguments and the result of `causal_attention`.
    """

    vocab_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    features: int = 128
    max_length: int = 128
    dropout: float = traced(0.0)
    scan_layers: bool = False
    attention: Attention = None

    @nn.compact
    def __call__(
        self, tokens: jax.Array, segment_ids: jax.Array | None = None, train: bool = True
    ) -> jax.Array:
        """Computes the logits of the token after each token.

        Args:
            tokens: int `[batch, length]`, at most `max_length` long.
            segment_ids: int `[batch, length]`, for rows of several sequences, as from
                `data.packed`; a token attends only to its own segment. Since positions are
                relative, the logits equal the logits of the sequence alone.
            train: use dropout.

        Returns:
            Logits, `[batch, length, vocab_size]`; each depends on no later token.

        Raises:
            BatchError: `tokens` are not integers `[batch, length]`, or too long, or `segment_ids`
                have another shape.
            ConfigError: `features` cannot be divided among the heads, or the backend does not have
                this `attention`.
        """
        self._check(tokens, segment_ids)
        x = nn.Embed(
            self.vocab_size, self.features, embedding_init=nn.initializers.normal(_INIT_SCALE)
        )(tokens)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        if self.scan_layers:
            x = _looped(self._block(name="blocks"), self.num_layers, x, segment_ids, train)
        else:
            for _ in range(self.num_layers):
                x = self._block()(x, segment_ids, train)
        return Linear(self.vocab_size, name="head")(nn.RMSNorm()(x))

    def _block(self, **options: Any) -> Block:
        out_scale = _INIT_SCALE / (2 * self.num_layers) ** 0.5
        return Block(self.num_heads, out_scale, self.dropout, self.attention, **options)

    def _check(self, tokens: jax.Array, segment_ids: jax.Array | None) -> None:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise BatchError(
                "GPT needs tokens [batch, length] of an int dtype; got shape "
                f"{tokens.shape} and dtype {tokens.dtype}."
            )
        if tokens.shape[1] > self.max_length:
            raise BatchError(
                f"GPT accepts at most max_length={self.max_length} tokens; the input has "
                f"{tokens.shape[1]}. Shorten it, or create the model with a larger max_length."
            )
        if segment_ids is not None and jnp.shape(segment_ids) != tokens.shape:
            raise BatchError(
                "GPT needs a segment id for each token; got segment_ids of shape "
                f"{jnp.shape(segment_ids)} for tokens of shape {tokens.shape}. To set the mode, "
                "write train=False."
            )
        if self.features % (2 * self.num_heads):
            raise ConfigError(
                "Each head of GPT needs an even number of features, features / num_heads; "
                f"got features={self.features}, num_heads={self.num_heads}."
            )
        check_attention(self.attention)


class Block(nn.Module):
    """Attention, then an MLP, each added to its input.

    Attributes:
        num_heads: attention heads.
        out_scale: initial standard deviation of the kernels that write into the residual stream.
        dropout: dropout rate of the output of each half.
        attention: as in `GPT`.
    """

    num_heads: int
    out_scale: float
    dropout: float = 0.0
    attention: Attention = None

    @nn.compact
    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None = None, train: bool = True
    ) -> jax.Array:
        """Returns the residual stream after the block, `[batch, length, features]`."""
        drop = nn.Dropout(self.dropout, deterministic=not train)
        features = x.shape[-1]
        heads = (*x.shape[:2], self.num_heads, features // self.num_heads)
        h = nn.RMSNorm()(x)
        query, key, value = (
            Linear(features, name=name)(h).reshape(heads) for name in ("query", "key", "value")
        )
        h = attend(self.attention, rotary(query), rotary(key), value, segment_ids)
        x = x + drop(Linear(features, self.out_scale, name="out")(h.reshape(x.shape)))
        h = nn.gelu(Linear(4 * features, name="up")(nn.RMSNorm()(x)))
        return x + drop(Linear(features, self.out_scale, name="down")(h))


def _looped(
    block: Block, length: int, x: jax.Array, segment_ids: jax.Array | None, train: bool
) -> jax.Array:
    """Runs blocks as one loop; a block's parameters have a leading axis for its number."""

    def body(block: Block, x: jax.Array, segment_ids: jax.Array | None) -> tuple[jax.Array, None]:
        return block(x, segment_ids, train), None

    loop: Any = nn.scan(
        body,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=length,
    )
    return loop(block, x, segment_ids)[0]


def rotary(x: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotates pairs of features by angles proportional to the position (RoPE).

    The dot product of a rotated query and a rotated key depends only on their distance. Su et al.
    2021, arXiv:2104.09864.

    Args:
        x: queries or keys, `[batch, length, heads, features]`, an even number of features.
        base: the slowest pair rotates by `base ** -(1 - 2 / features)` radians per position.

    Returns:
        As `x`; feature `i` is paired with feature `i + features / 2`.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half) / half)
    angles = jnp.outer(jnp.arange(x.shape[1]), frequencies)
    cos, sin = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


class Linear(nn.Module):
    """A linear layer without bias over the last axis.

    Attributes:
        features: length of the last axis of the outputs.
        scale: initial standard deviation of the kernel.
    """

    features: int
    scale: float = _INIT_SCALE

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns `x @ kernel`, `[..., features]`."""
        init = nn.initializers.normal(self.scale)
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        # With one leading axis the kernel's gradient is one matrix product; with two, XLA for CPU
        # first copies the transpose of the outputs' gradient, which takes longer than the product.
        outputs = x.reshape(-1, x.shape[-1]) @ kernel
        return outputs.reshape(*x.shape[:-1], self.features)

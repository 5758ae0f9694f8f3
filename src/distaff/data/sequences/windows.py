"""Windows of a text, for models that predict each byte from the bytes before it."""

from __future__ import annotations

import numpy as np

from distaff.core.typing import Batch
from distaff.data.arrays import ArrayLoader
from distaff.data.wrappers.mapped import MappedLoader
from distaff.errors import BatchError, ConfigError

_FIRST_CONTEXT = b"\0"


def shuffled_windows(
    text: bytes, length: int, batch_size: int, *, stride: int | None = None, seed: int = 0
) -> MappedLoader:
    """Returns a loader of training windows, in a new order in each epoch.

    Args:
        text: the text.
        length: number of predicted bytes in a window.
        batch_size: windows in a batch; a short last batch is dropped.
        stride: bytes between the starts of consecutive windows. Default: `length`, so that an epoch
            contains every byte once. A smaller stride makes more windows, which overlap.
        seed: seed of the orders, not negative.

    Returns:
        A loader of `{"tokens": int32 [batch, length + 1]}`: one byte of context, then the bytes to
        predict.

    Raises:
        BatchError: the text is too short for one batch.
        ConfigError: `length`, `stride` or another option is out of range.
    """
    stride = _checked(text, length, stride)
    starts = np.arange(0, len(text) - length, stride)
    stream = np.frombuffer(text, np.uint8)
    if len(starts) < batch_size:
        raise BatchError(
            f"The text must fill at least one batch; {len(text)} bytes make {len(starts)} windows "
            f"of length={length} at stride={stride}, and batch_size is {batch_size}. Pass more "
            "text, or lower one of the three."
        )

    def cut(batch: Batch) -> Batch:
        return {"tokens": _windows(stream, batch["start"], length)}

    return MappedLoader(ArrayLoader({"start": starts}, batch_size, shuffle=True, seed=seed), cut)


def held_out_windows(
    text: bytes, length: int, batch_size: int, *, stride: int | None = None
) -> MappedLoader:
    """Returns a loader of evaluation windows, in which every byte is predicted exactly once.

    The first byte is predicted from a zero byte, every other byte from the bytes before it in its
    window. All bytes of the text count, so the sum of the losses is the length of a code for the
    whole text, comparable to the size of a gzip file. With a stride, windows overlap, and bytes
    that an earlier window predicted are only context.

    Args:
        text: the text.
        length: number of bytes in a window.
        batch_size: windows in a batch; the last batch may be shorter.
        stride: bytes predicted by a window, from 1 to `length`. Except in the first window, each
            byte then has at least `length - stride` bytes of context, and the evaluation takes
            `length / stride` times as long. Default: `length`, without overlap, which gives a byte
            half a window of context on average.

    Returns:
        A loader of `{"tokens": int32 [batch, length + 1], "mask": bool [batch, length]}`. The mask
        marks the predicted bytes of `tokens[:, 1:]`.

    Raises:
        BatchError: the text is shorter than a window.
        ConfigError: `length`, `stride` or another option is out of range.
    """
    stride = _checked(text, length, stride)
    stream = np.frombuffer(_FIRST_CONTEXT + text, np.uint8)
    # The last window is moved back instead of padded, which gives it more context.
    ends = np.minimum(np.arange(length, len(text) + stride, stride), len(text))
    counts = np.diff(ends, prepend=0)

    def cut(batch: Batch) -> Batch:
        tokens = _windows(stream, batch["end"] - length, length)
        return {"tokens": tokens, "mask": np.arange(length) >= length - batch["count"][:, None]}

    return MappedLoader(ArrayLoader({"end": ends, "count": counts}, batch_size), cut)


def _windows(stream: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    return stream[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def _checked(text: bytes, length: int, stride: int | None) -> int:
    stride = length if stride is None else stride
    if not isinstance(text, bytes):
        raise BatchError(
            f"The text must be bytes; got {type(text).__name__}. Convert a str with text.encode()."
        )
    if not 1 <= stride <= length:
        raise ConfigError(
            f"Windows need 1 <= stride <= length; got length={length}, stride={stride}. Change one "
            "of the two."
        )
    if len(text) < length:
        raise BatchError(
            f"The text must hold at least one window of length={length}; it has {len(text)} bytes. "
            "Pass more text, or a smaller length."
        )
    return stride

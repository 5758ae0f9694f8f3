"""Windows of a text, for models that predict each byte from those before it."""

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
    """Returns a loader of windows to train on, in a new order in each epoch.

    Args:
        text: what the windows are cut from.
        length: bytes of a window that are predicted; each from all before it in the window.
        batch_size: windows in a batch; a short last batch is dropped.
        stride: bytes from the start of one window to the next one's. By default `length`: an epoch
            holds every byte once. A smaller one makes more windows, at more places of the text.
        seed: makes the orders, not negative.

    Returns:
        A loader of `{"tokens": int32 [batch, length + 1]}`: the bytes to predict, and before them
        one that is only seen.

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
            f"of length={length} at stride={stride}, and batch_size is {batch_size}. Give more "
            "text, or lower one of the three."
        )

    def cut(batch: Batch) -> Batch:
        return {"tokens": _windows(stream, batch["start"], length)}

    return MappedLoader(ArrayLoader({"start": starts}, batch_size, shuffle=True, seed=seed), cut)


def held_out_windows(
    text: bytes, length: int, batch_size: int, *, stride: int | None = None
) -> MappedLoader:
    """Returns a loader of windows to evaluate on, in which every byte is predicted exactly once.

    The first byte is predicted from a zero byte, every other one from those before it in its
    window: the first byte of the text and the last one count like all others, so that the sum of
    all losses is the length of a code for the whole text, as of a file that gzip compresses. With
    a stride, windows overlap, and the bytes that an earlier window has predicted are context only.

    Args:
        text: what is predicted.
        length: bytes of a window.
        batch_size: windows in a batch; the last batch may be shorter.
        stride: bytes that a window predicts, from 1 to `length`. Each byte, but those of the first
            window, then sees at least `length - stride` bytes before it, in an evaluation that
            takes `length / stride` times as long. By default `length`: windows do not overlap, and
            a byte sees half a window on average.

    Returns:
        A loader of `{"tokens": int32 [batch, length + 1], "mask": bool [batch, length]}`. The mask
        tells which of `tokens[:, 1:]` are predicted.

    Raises:
        BatchError: the text is shorter than a window.
        ConfigError: `length`, `stride` or another option is out of range.
    """
    stride = _checked(text, length, stride)
    stream = np.frombuffer(_FIRST_CONTEXT + text, np.uint8)
    # The last window is moved back, rather than padded: it then holds more context.
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
            f"Windows are cut from bytes; got {type(text).__name__}. Of a str, give text.encode()."
        )
    if not 1 <= stride <= length:
        raise ConfigError(
            "A window has at least one byte, and begins at most one window after the one before "
            f"it: 1 <= stride <= length; got length={length}, stride={stride}."
        )
    if len(text) < length:
        raise BatchError(
            f"The text must hold at least one window of length={length}; it has {len(text)} bytes. "
            "Give more text, or a smaller length."
        )
    return stride

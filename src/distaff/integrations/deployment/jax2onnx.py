"""jax2onnx: converts a function to ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

_OUTER = jnp.outer  # jax2onnx replaces it

import jax2onnx  # noqa: E402


def write(
    call: Callable[..., tuple[Any, ...]],
    inputs: Mapping[str, jax.Array],
    output_names: list[str],
    path: Path,
    batch_size: int | None,
) -> None:
    """Writes a function of arrays as an ONNX file.

    Args:
        call: `(*inputs) -> outputs`, each `[batch, ...]`.
        inputs: an example of each input by name.
        output_names: names of the outputs.
        path: the file to write.
        batch_size: number of examples of each call; None for any number.
    """
    size = "batch" if batch_size is None else batch_size

    def traced(*arrays: jax.Array) -> tuple[Any, ...]:
        # With its own `outer`, jax2onnx 0.17 writes a product of an int32 and a float32.
        with mock.patch.object(jnp, "outer", _OUTER):
            return call(*arrays)

    jax2onnx.to_onnx(
        traced,
        [_Spec((size, *x.shape[1:]), x.dtype) for x in inputs.values()],
        input_names=list(inputs),
        output_names=output_names,
        return_mode="file",
        output_path=path,
    )


class _Spec:
    """Shape, with the name of an axis of any size, and dtype."""

    def __init__(self, shape: tuple[int | str, ...], dtype: Any) -> None:
        self.shape, self.dtype = shape, dtype

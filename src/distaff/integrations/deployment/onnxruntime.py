"""onnxruntime: computes the outputs of an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


def difference(path: Path, inputs: Mapping[str, Any], expected: list[Any]) -> float:
    """Returns the largest difference of outputs by onnxruntime, relative to the largest output.

    Args:
        path: an ONNX file.
        inputs: arrays by name.
        expected: the outputs in order.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: np.asarray(x) for name, x in inputs.items()})
    most = 0.0
    for got, wanted in zip(found, map(np.asarray, expected), strict=True):
        if got.shape != wanted.shape:
            return float("inf")
        scale = max(1.0, float(np.abs(wanted).max(initial=0)))
        most = max(most, float(np.abs(got - wanted).max(initial=0)) / scale)
    return most

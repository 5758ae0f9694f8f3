"""Exports a model to ONNX, and checks the file with onnxruntime."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp

from distaff.core import optional
from distaff.core.files import explained
from distaff.core.typing import Batch
from distaff.errors import ConfigError, MissingExtraError
from distaff.export.program import NamedProgram, named_program, output_name
from distaff.trainer.predictor import Predictor

TOLERANCE = 1e-5
"""Largest difference of an output, relative to the largest output if that is above 1."""

_SIZES = (1, 5)


def export_onnx(
    trainer: Predictor,
    target: Path,
    example: Batch,
    *,
    batch_size: int | None,
    weights: str | None,
) -> None:
    """Writes the outputs of `trainer.predict_fn` as an ONNX file.

    Raises:
        ConfigError: the model cannot be converted, or the file computes something else.
        MissingExtraError: jax2onnx or onnxruntime is not installed.
        RunDirectoryError: the file cannot be written.
    """
    converter, runtime = _package("jax2onnx"), _package("onnxruntime")
    program = named_program(trainer, example, weights, has_keys=False)

    def call(*inputs: jax.Array) -> tuple[jax.Array, ...]:
        named = dict(zip(program.inputs, inputs, strict=True))
        return tuple(jax.tree.leaves(program.call(program.weights, named)))

    shapes = jax.eval_shape(program.call, program.weights, program.inputs)
    names = [output_name(path).replace("/", ".") for path, _ in jax.tree.leaves_with_path(shapes)]
    with explained(target, rule="An exported model must be a file that can be {}", other="path"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            written = Path(folder) / "model.onnx"
            try:
                converter.write(call, program.inputs, names, written, batch_size)
                found = max(
                    runtime.difference(written, inputs, jax.tree.leaves(call(*inputs.values())))
                    for inputs in _probes(program, batch_size)
                )
            except Exception as error:
                raise ConfigError(
                    f"jax2onnx cannot convert this model: {type(error).__name__}: "
                    f"{str(error).splitlines()[0] if str(error) else ''} Export it as StableHLO, "
                    "to a path without .onnx."
                ) from error
            if not found <= TOLERANCE:
                raise ConfigError(
                    f"The ONNX file must compute what the model computes; its outputs differ by "
                    f"{found:.3g}, more than {TOLERANCE:g}. Export the model as StableHLO, "
                    "to a path without .onnx."
                )
            written.rename(target)


def _probes(program: NamedProgram, batch_size: int | None) -> list[dict[str, jax.Array]]:
    """Returns inputs of several sizes: random floats, and the whole numbers of the example."""
    key = jax.random.key(0)
    return [
        {
            name: jax.random.normal(key, (size, *x.shape[1:]), x.dtype)
            if jnp.issubdtype(x.dtype, jnp.floating)
            else jnp.resize(x, (size, *x.shape[1:]))
            for name, x in program.inputs.items()
        }
        for size in (_SIZES if batch_size is None else (batch_size,))
    ]


def _package(name: str) -> ModuleType:
    try:
        return optional.load(f"deployment.{name}", extra="onnx")
    except MissingExtraError as error:
        raise MissingExtraError(
            f"Exporting to ONNX needs the package {name!r}, which is not installed. jax2onnx pins "
            "an older Orbax, so install it without its pins, in an environment of its own: "
            "pip install distaff dm-pix onnx onnx-ir onnxruntime; pip install --no-deps jax2onnx"
        ) from error

"""A model as programs of fixed sizes, compiled before the first request."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.typing import Batch
from distaff.errors import ConfigError, DataFileError
from distaff.export.program import TRACED_SIZE, NamedProgram, named_program, output_name
from distaff.trainer.predictor import Predictor


class Form(NamedTuple):
    """Shape and dtype of an input for one example."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(map(str, ('rows', *self.shape)))}]"


class ServedModel:
    """A model that computes any number of examples with programs of fixed sizes.

    A batch is padded to the next size by repeating its last example, so that nothing compiles after
    the constructor. The outputs for an example do not depend on the others: a model for which that
    is not certain is served one example at a time.

    Args:
        call: `(weights, inputs) -> outputs`, by name; each output is `[batch, ...]`.
        weights: arrays of the model by name.
        inputs: shape and dtype of each input by name.
        sizes: the sizes of the programs, ascending.

    Attributes:
        inputs: shape and dtype of each input by name.
        outputs: shape and dtype of each output by name.
        sizes: the sizes of the programs, ascending.

    Raises:
        ConfigError: an output has no batch axis.
    """

    def __init__(
        self,
        call: Callable[[Any, Any], Any],
        weights: Mapping[str, Any],
        inputs: Mapping[str, Form],
        sizes: tuple[int, ...],
    ) -> None:
        self.inputs, self.sizes = dict(inputs), sizes
        self._weights = {name: jnp.asarray(array) for name, array in weights.items()}
        jitted = jax.jit(call)
        self._programs = {
            size: jitted.lower(self._weights, self._batch(size)).compile() for size in sizes
        }
        self.outputs = self._outputs(call)
        for size in sizes:  # the first call of a program is slower
            zeros = {name: np.zeros((size, *f.shape), f.dtype) for name, f in self.inputs.items()}
            self(zeros)

    @classmethod
    def of(
        cls,
        trainer: Predictor,
        example_batch: Batch,
        *,
        max_batch_size: int = 32,
        weights: str | None = None,
    ) -> ServedModel:
        """Returns the model of a trained or loaded trainer, with the outputs of `predict`.

        Args:
            trainer: the trainer.
            example_batch: a batch as in training; only shapes and dtypes count.
            max_batch_size: most examples that one program computes.
            weights: see `TrainerModule.evaluation_state`.

        Raises:
            ConfigError: the model mixes examples, and `max_batch_size` is not 1.
            BatchError: the outputs do not depend on the batch.
            StateError: the model has no parameters yet, or does not have this average.
        """
        program: NamedProgram = named_program(trainer, example_batch, weights)
        if max_batch_size > 1 and not program.keeps_apart(TRACED_SIZE):
            raise _mixes()
        forms = {n: Form(x.shape[1:], np.dtype(x.dtype)) for n, x in program.inputs.items()}
        return cls(program.call, program.weights, forms, _sizes(max_batch_size))

    @classmethod
    def read(cls, folder: Path, *, max_batch_size: int = 32) -> ServedModel:
        """Returns an exported model. No code of the folder is run.

        Raises:
            ConfigError: the model mixes examples, and `max_batch_size` is not 1.
            DataFileError: the folder is not an exported model, or this JAX cannot read it.
        """
        try:
            facts = json.loads((folder / "model.json").read_text("utf-8"))
            with np.load(folder / "weights.npz", allow_pickle=False) as file:
                weights = {name: file[name] for name in file.files}
            program = jax.export.deserialize(bytearray((folder / "model.jax").read_bytes()))
            forms = {
                str(name): Form(tuple(map(int, form["shape"][1:])), jnp.dtype(form["dtype"]))
                for name, form in facts["inputs"].items()
            }
            only, is_apart = facts["batch_size"], bool(facts["keeps_apart"])
        except Exception as error:
            raise DataFileError(
                f"{str(folder)!r} is not an exported model that this JAX reads: {error!r}. Export "
                "the run again: distaff export RUN FOLDER"
            ) from error
        if only is None and max_batch_size > 1 and not is_apart:
            raise _mixes()
        if only is not None and only > 1 and not is_apart:
            raise ConfigError(
                f"The outputs of this model depend on all {only} examples of a batch, so requests "
                "cannot be padded. Serve the run instead of the exported folder."
            )
        return cls(
            program.call, weights, forms, _sizes(max_batch_size) if only is None else (only,)
        )

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the outputs for inputs by name, each `[rows, ...]` with at least one row."""
        rows, most, parts = len(next(iter(inputs.values()))), self.sizes[-1], []
        for start in range(0, rows, most):
            part = {name: x[start : start + most] for name, x in inputs.items()}
            parts.append(self._one(part, min(most, rows - start)))
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.outputs}

    def _one(self, inputs: Mapping[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
        size = next(size for size in self.sizes if size >= rows)
        given = {name: _padded(inputs[name], size) for name in self.inputs}
        outputs = jax.tree.leaves(jax.device_get(self._programs[size](self._weights, given)))
        return {n: np.asarray(x)[:rows] for n, x in zip(self.outputs, outputs, strict=True)}

    def _batch(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            name: jax.ShapeDtypeStruct((size, *form.shape), form.dtype)
            for name, form in self.inputs.items()
        }

    def _outputs(self, call: Callable[[Any, Any], Any]) -> dict[str, Form]:
        size = self.sizes[-1]
        shapes = jax.eval_shape(call, self._weights, self._batch(size))
        found = {output_name(path): x for path, x in jax.tree.leaves_with_path(shapes)}
        wrong = {name: x.shape for name, x in found.items() if x.shape[:1] != (size,)}
        if wrong:
            raise ConfigError(
                f"Each output must have one entry per example, [batch, ...]; for {size} examples "
                f"the shapes are {wrong}. Override predict_fn to return such outputs."
            )
        return {name: Form(x.shape[1:], np.dtype(x.dtype)) for name, x in found.items()}


def _padded(array: np.ndarray, size: int) -> np.ndarray:
    missing = size - len(array)
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing else array


def _sizes(most: int) -> tuple[int, ...]:
    """Returns the powers of 2 below `most`, and `most` itself."""
    return (*(2**n for n in range(most.bit_length()) if 2**n < most), most)


def _mixes() -> ConfigError:
    return ConfigError(
        "The outputs of this model for an example may depend on the other examples of its batch, "
        "so requests cannot share a batch. Pass max_batch_size=1."
    )

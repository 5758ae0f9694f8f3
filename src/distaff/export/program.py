"""The program of an exported model: outputs from weights and inputs by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from distaff.core.typing import Batch
from distaff.data import num_examples
from distaff.errors import BatchError, ConfigError, leaf_name
from distaff.step.context import Context
from distaff.step.independence import keeps_apart
from distaff.step.state import TrainState
from distaff.trainer.predictor import Predictor

_MODEL = ("params", "batch_stats", "collections", "averages")
TRACED_SIZE = 7
"""Number of examples of a batch that is traced, for a model that takes batches of any size."""


class ExportedProgram(NamedTuple):
    """What is exported.

    Attributes:
        serialized: the program, as `jax.export.deserialize` reads it.
        weights: arrays by path; bfloat16 is stored as float32, which is exact.
        inputs: shape and dtype of each input by name, without the batch axis.
        outputs: shape and dtype of each output by path, with the batch axis as "batch".
        keeps_apart: whether the outputs for an example depend on that example alone.
    """

    serialized: bytes
    weights: dict[str, np.ndarray]
    inputs: dict[str, dict[str, Any]]
    outputs: dict[str, dict[str, Any]]
    keeps_apart: bool


class NamedProgram(NamedTuple):
    """The outputs of a trainer as a function of arrays by name.

    Attributes:
        call: `(weights, inputs) -> outputs`.
        weights: arrays of the model by path.
        inputs: an example of each input by name.
    """

    call: Callable[[dict[str, jax.Array], dict[str, jax.Array]], Any]
    weights: dict[str, jax.Array]
    inputs: dict[str, jax.Array]

    def keeps_apart(self, size: int) -> bool:
        """Returns whether the outputs for an example depend on that example alone.

        Args:
            size: number of examples of the batch that is traced.
        """
        batch = {
            name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)
            for name, x in self.inputs.items()
        }
        return keeps_apart(lambda *given: jax.make_jaxpr(self.call)(*given), self.weights, batch)


def named_program(
    trainer: Predictor, example: Batch, weights: str | None, *, has_keys: bool = True
) -> NamedProgram:
    """Returns the outputs of `trainer.predict_fn` as a function of weights and inputs by name.

    Args:
        trainer: a trained or loaded trainer.
        example: a batch with at least one example.
        weights: see `TrainerModule.evaluation_state`.
        has_keys: whether the random key of a step is a key, or its data, with equal results.

    Raises:
        BatchError: the outputs depend on no leaf of the batch.
        StateError: the model has no parameters yet, or does not have this average.
    """
    state = trainer.evaluation_state(weights)
    if not has_keys and state.rng is not None and _is_key(state.rng):
        state = state.replace(rng=jax.random.key_data(state.rng))
    arrays, rebuilt = _weights_of(state)
    leaves, structure = jax.tree.flatten_with_path(example)
    batch = [jnp.asarray(leaf) for _, leaf in leaves]

    def outputs_of(arrays: dict[str, jax.Array], leaves: list[jax.Array]) -> Any:
        state = rebuilt(arrays)
        given = jax.tree.unflatten(structure, leaves)
        return trainer.predict_fn(state.params, given, Context(state, train=False))

    used = _used(outputs_of, arrays, batch)
    if not any(used):
        raise BatchError("The outputs must depend on the batch; predict_fn uses no leaf of it.")
    names = [_argument(path) for path, _ in leaves]
    inputs = {n: x for n, x, is_used in zip(names, batch, used, strict=True) if is_used}

    def program(arrays: dict[str, jax.Array], inputs: dict[str, jax.Array]) -> Any:
        size = next(iter(inputs.values())).shape[0]
        fill = [jnp.zeros((size, *x.shape[1:]), x.dtype) for x in batch]  # unused leaves
        return outputs_of(arrays, [inputs.get(n, x) for n, x in zip(names, fill, strict=True)])

    return NamedProgram(program, arrays, inputs)


def program_of(
    trainer: Predictor,
    example: Batch,
    *,
    batch_size: int | None,
    platforms: tuple[str, ...],
    weights: str | None,
) -> ExportedProgram:
    """Exports `trainer.predict_fn` for batches like `example`.

    Raises:
        BatchError: the outputs depend on no leaf of the batch.
        ConfigError: the model does not accept a batch axis of any size.
    """
    named = named_program(trainer, example, weights)
    program, arrays, inputs = named
    size = batch_size if batch_size is not None else export.symbolic_shape("batch")[0]
    of_batch = {n: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for n, x in inputs.items()}
    stored = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in _stored(arrays).items()}
    try:
        exported = export.export(jax.jit(program), platforms=platforms)(stored, of_batch)
    except Exception as error:
        if batch_size is not None:
            raise
        raise ConfigError(
            "The model cannot be exported for batches of any size: "
            f"{str(error).splitlines()[0]} Pass batch_size= to export it for one size."
        ) from error
    if batch_size is None or batch_size == num_examples(inputs):
        _check(exported, arrays, inputs, program(arrays, inputs), platforms)
    described = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    outputs = jax.tree.leaves_with_path(described)
    return ExportedProgram(
        bytes(exported.serialize()),
        _stored(arrays),
        {n: {"shape": ["batch", *x.shape[1:]], "dtype": str(x.dtype)} for n, x in inputs.items()},
        {output_name(path): _form(aval) for path, aval in outputs},
        named.keeps_apart(TRACED_SIZE if batch_size is None else batch_size),
    )


def _weights_of(
    state: TrainState,
) -> tuple[dict[str, jax.Array], Callable[[dict[str, jax.Array]], TrainState]]:
    """Returns the arrays of the model by path, and a function that puts such arrays into it.

    A random key is stored as its data, unsigned integers.
    """
    tree = {name: getattr(state, name) for name in _MODEL if getattr(state, name) is not None}
    leaves, structure = jax.tree.flatten_with_path(tree)
    arrays = {
        leaf_name(path): jax.random.key_data(leaf) if _is_key(leaf) else leaf
        for path, leaf in leaves
    }

    def rebuilt(arrays: dict[str, jax.Array]) -> TrainState:
        given = [_like(arrays[leaf_name(path)], leaf) for path, leaf in leaves]
        return state.replace(opt_state=None, **jax.tree.unflatten(structure, given))

    return arrays, rebuilt


def _is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _like(array: jax.Array, leaf: jax.Array) -> jax.Array:
    if _is_key(leaf):
        return jax.random.wrap_key_data(array, impl=str(jax.random.key_impl(leaf)))
    return array.astype(leaf.dtype)


def _stored(arrays: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Returns arrays that NumPy's format knows: other floats than its own become float32."""
    return {
        name: np.asarray(x.astype(jnp.float32) if x.dtype.kind == "V" else x)
        for name, x in arrays.items()
    }


def _used(function: Any, arrays: dict[str, jax.Array], batch: list[jax.Array]) -> list[bool]:
    """Returns for each leaf of the batch whether the outputs are computed from it."""
    closed = jax.make_jaxpr(function)(arrays, batch)
    read = {id(v) for equation in closed.jaxpr.eqns for v in equation.invars}
    read |= {id(v) for v in closed.jaxpr.outvars}
    return [id(v) in read for v in closed.jaxpr.invars[len(arrays) :]]


def _check(
    exported: export.Exported, arrays: Any, inputs: Any, expected: Any, platforms: tuple[str, ...]
) -> None:
    """Compares the outputs of the program with the outputs of the model, on this platform."""
    if export.default_export_platform() not in platforms:
        return
    found = exported.call(_stored(arrays), inputs)
    for got, model in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if not np.allclose(got, model, rtol=1e-2, atol=1e-2, equal_nan=True):
            raise ConfigError(
                "The exported program must compute what the model computes; for the example batch "
                "it does not. The model may depend on the number of examples: pass batch_size=."
            )


def _argument(path: tuple[Any, ...]) -> str:
    """Returns the name of an input: a keyword of the loader's function."""
    name = re.sub(r"\W", "_", leaf_name(path)) if path else "inputs"
    return name if name.isidentifier() else f"input_{name}"


def output_name(path: tuple[Any, ...]) -> str:
    """Returns the name of an output; a single array is `outputs`."""
    return leaf_name(path) if path else "outputs"


def _form(aval: Any) -> dict[str, Any]:
    return {
        "shape": [d if isinstance(d, int) else str(d) for d in aval.shape],
        "dtype": str(aval.dtype),
    }

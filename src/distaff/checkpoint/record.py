"""The record of a run, `config.json`: model, options, and the shapes of an example batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from distaff.core.config.encoding import to_json
from distaff.core.config.strict_json import load
from distaff.core.typing import Batch
from distaff.errors import CheckpointError


def make_record(**parts: Any) -> dict[str, Any]:
    """Returns the record of a run as strict JSON.

    Args:
        **parts: everything that determines the run, by name. `load_from_checkpoint` reads
            `model`, `options` and `example_batch`.
    """
    form = _batch_form(parts.pop("example_batch"))
    return {"distaff": version("distaff"), **to_json(parts), "example_batch": form}


def read_record(path: Path) -> dict[str, Any]:
    """Reads the record of a run.

    Raises:
        CheckpointError: it is missing, is not JSON, or lacks an entry.
    """
    remedy = "Pass the path of a run directory, or of a checkpoint inside one."
    try:
        record = load(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read {path}, the run's record: {error}. {remedy}") from error
    return checked_record(record, path)


def checked_record(record: Any, path: Path) -> dict[str, Any]:
    """Returns a record that was read from a path, if it is valid.

    Raises:
        CheckpointError: it lacks an entry.
    """
    missing = [
        name
        for name in ("model", "options", "example_batch")
        if not isinstance(record, dict) or name not in record
    ]
    if missing:
        raise CheckpointError(
            f"{path} is not the record of a run: it lacks {missing}. Pass the path of a run "
            "directory, or of a checkpoint inside one."
        )
    return record


def _batch_form(batch: Batch) -> Any:
    """Returns shapes and dtypes of a batch; named tuples and dataclasses become dicts."""
    if hasattr(batch, "_asdict"):
        batch = batch._asdict()
    elif dataclasses.is_dataclass(batch):
        batch = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    if isinstance(batch, Mapping):
        return {str(name): _batch_form(value) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [_batch_form(value) for value in batch]
    if hasattr(batch, "shape"):
        return {"$array": {"shape": list(batch.shape), "dtype": str(batch.dtype)}}
    return None


def example_from(form: Any, *, whole: bool = False) -> Batch:
    """Returns a batch of zeros with the recorded shapes and dtypes.

    Args:
        form: the `example_batch` of a record.
        whole: whether to return as many examples as recorded, instead of one.

    Raises:
        CheckpointError: the shapes were not recorded, or are invalid.
    """
    if isinstance(form, Mapping) and "$array" in form:
        try:
            shape, dtype = form["$array"]["shape"], form["$array"]["dtype"]
            return np.zeros(shape if whole else [1, *shape[1:]], jnp.dtype(dtype))
        except (KeyError, TypeError, ValueError, MemoryError) as error:
            raise CheckpointError(
                f"The record of the run has an array of the form {form['$array']!r}, which is "
                f"invalid: {error}. Pass example_batch=... to load_from_checkpoint."
            ) from error
    if isinstance(form, Mapping):
        return {name: example_from(value, whole=whole) for name, value in form.items()}
    if isinstance(form, list):
        return tuple(example_from(value, whole=whole) for value in form)
    raise CheckpointError(
        "The run's batches are not dicts, tuples or lists of arrays, so their shapes are not "
        "recorded. Pass example_batch=... to load_from_checkpoint."
    )

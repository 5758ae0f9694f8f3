"""Exports the arrays of a model as a safetensors file."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distaff.checkpoint.manifest import sync_directory
from distaff.checkpoint.weights.names import as_patterns, matching, named
from distaff.checkpoint.weights.pytorch import TorchRules, make_plan, modules_of, tensors_of
from distaff.checkpoint.weights.source import SUFFIX, is_random_key
from distaff.core import optional
from distaff.core.files import FILE_MODE
from distaff.core.paths import as_path
from distaff.core.typing import PyTree
from distaff.errors import CheckpointError
from distaff.execution.shards import whole
from distaff.models import Variables


def export_weights(path: str | Path, tree: PyTree, *, only: str | Sequence[str] = "*") -> Path:
    """Writes the arrays of a model to a safetensors file, atomically.

    Names are paths: `encoder/Dense_0/kernel` for a parameter; other arrays start with their
    collection, `batch_stats/BatchNorm_0/mean`. Random keys are skipped. An existing file is
    replaced. With several processes, the first one writes.

    Args:
        path: the file, which ends in `.safetensors`.
        tree: a tree of parameters, a dict with the key `params` and other collections, or a
            `TrainState`.
        only: shell patterns for the names to write.

    Returns:
        The absolute path of the file.

    Raises:
        CheckpointError: the format does not support the dtype of an array, or the file cannot be
            written.
        ConfigError: a pattern matches nothing.
        MissingExtraError: safetensors is not installed.
    """
    leaves = {name: leaf for name, leaf in named(tree).items() if not is_random_key(leaf)}
    return write_weights(path, leaves, only)


def export_torch_weights(
    path: str | Path,
    model: Any,
    variables: Variables,
    rules: TorchRules,
    init: Callable[[], Any],
    *,
    only: str | Sequence[str] = "*",
) -> Path:
    """Writes the arrays of a model as tensors that PyTorch's `load_state_dict` takes.

    The metadata of the file is as in PyTorch, `{"format": "pt"}`, which Hugging Face requires.

    Args:
        path: the file, which ends in `.safetensors`.
        model: the adapter of the model.
        variables: its arrays.
        rules: names in PyTorch.
        init: creates the variables, to see the modules of the model; only traced.
        only: shell patterns for the names of the tensors to write.

    Returns:
        The absolute path of the file.

    Raises:
        CheckpointError: the file cannot be written.
        ConfigError: a pattern matches nothing, or PyTorch has no such layer.
    """
    plan = make_plan(variables, modules_of(model, init), rules)
    arrays = {n: np.asarray(whole(x)) for n, x in named(variables).items() if not is_random_key(x)}
    return write_weights(path, tensors_of(arrays, plan, rules), only, {"format": "pt"})


def write_weights(
    path: str | Path,
    leaves: Mapping[str, Any],
    only: str | Sequence[str],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes arrays by name, and metadata, to a file; see `export_weights`."""
    target = as_path(path, "path")
    if target.suffix != SUFFIX:
        raise CheckpointError(f"export_weights writes a file that ends in {SUFFIX}; got {path}.")
    library = optional.load("safetensors", extra="safetensors")
    arrays = {
        name: np.asarray(whole(leaves[name])) for name in matching(list(leaves), as_patterns(only))
    }
    if jax.process_index() > 0:
        return target
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        library.write(temporary, arrays, metadata)
        _put_in_place(temporary, target)
    except OSError as error:
        raise CheckpointError(
            f"The weights cannot be written to {target}: {error}. Free space there, or choose a "
            "directory that you may write to."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _put_in_place(temporary: Path, target: Path) -> None:
    temporary.chmod(FILE_MODE)
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, target)
    sync_directory(target.parent)

"""Reads VeLO's meta-parameters from a folder in their published format."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from flax import traverse_util

from distaff.core.paths import as_path
from distaff.errors import CheckpointError
from distaff.optim.learned.gin import read_settings
from distaff.optim.learned.msgpack import read_tree
from distaff.optim.learned.settings import VeloWeights

_NAME = "aug12_continue_on_bigger_2xbs_200kstep_bigproblem_v2_5620"
_FOLDER = f"gresearch/learned_optimization/pretrained_lopts/{_NAME}"

WHERE_TO_GET = (
    "VeLO's weights are not shipped with this package. Fetch the two files `params` (9.3 MB) and "
    f"`config.gin` from gs://{_FOLDER}/, for instance as "
    f"https://storage.googleapis.com/{_FOLDER}/params, put both into one folder, and pass its path "
    'as an option: OptimizerConfig("velo", options={"weights": "/that/folder"}).'
)
"""Instructions for downloading the weights."""

_FILES = {"config.gin": 2**17, "params": 2**27}


def read_weights(folder: str | os.PathLike[str]) -> VeloWeights:
    """Reads VeLO's settings and arrays from a folder with the files `params` and `config.gin`.

    Nothing in it is executed or looked up by name. The files must be whole regular files, not
    links, with the names, shapes and dtypes of a HyperV2 network with the settings of `config.gin`,
    and only finite numbers.

    Raises:
        CheckpointError: a file is missing or invalid.
    """
    path = as_path(folder, "The folder of the weights")
    config, params = (_read(path / name, most) for name, most in _FILES.items())
    try:
        settings = read_settings(config.decode())
        return VeloWeights(settings, _arrays(read_tree(params)))
    except (CheckpointError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"The weights in {path} cannot be used: {error} Fetch both files again. {WHERE_TO_GET}"
        ) from error


def _read(path: Path, most: int) -> bytes:
    try:
        status = path.lstat()
        is_plain = stat.S_ISREG(status.st_mode) and status.st_size <= most
        data = path.read_bytes() if is_plain else b""
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. {WHERE_TO_GET}") from error
    if not is_plain:
        raise CheckpointError(
            f"{path} must be a regular file, not a link, of at most {most} bytes; got "
            f"{stat.filemode(status.st_mode)} of {status.st_size} bytes. {WHERE_TO_GET}"
        )
    return data


def _arrays(tree: Any) -> dict[tuple[str, ...], Any]:
    """Returns the arrays of a checkpoint of meta-training by path."""
    if not isinstance(tree, dict) or set(tree) != {"params", "gen_id", "step"}:
        raise CheckpointError("params must hold `params`, `gen_id` and `step` only.")
    leaves = traverse_util.flatten_dict({"params": tree["params"]})
    return {path[1:]: leaf for path, leaf in leaves.items()}

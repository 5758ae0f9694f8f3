"""The commands `distaff eval`, `predict` and `export`: a trained model on data of your own."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from distaff import tasks
from distaff.checkpoint import located
from distaff.checkpoint.record import example_from
from distaff.cli.recipes import load_code
from distaff.core.files import explained
from distaff.core.paths import shown
from distaff.errors import ConfigError, DataFileError, leaf_name
from distaff.export import export_model
from distaff.trainer.module import TrainerModule

Run = tyro.conf.Positional[Path]

_OUTPUTS = (".npz", ".npy", ".csv")


def evaluate(
    run: Run,
    data: tyro.conf.Positional[Path],
    code: str | None = None,
    weights: str | None = None,
) -> int:
    """Evaluates the best model of a run on data, and prints its metrics.

    Args:
        run: path of a run, such as runs/digits/0001, or of one of its checkpoints.
        data: an .npz file with the arrays of a batch by name, such as image and label.
        code: file or module with your classes, such as train.py or package.module.
        weights: "raw", "ema" or "swa"; by default those that the monitor judges.
    """
    metrics = loaded(run, code).eval_model(read_data(data), weights=weights)
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        print(f"{name:<{width}}  {np.array2string(np.asarray(value), precision=6)}")
    return 0


def predict(
    run: Run,
    data: tyro.conf.Positional[Path],
    out: Path = Path("predictions.npz"),
    argmax: bool = False,
    code: str | None = None,
    weights: str | None = None,
) -> int:
    """Writes the outputs of the best model of a run for data.

    Args:
        run: path of a run, such as runs/digits/0001, or of one of its checkpoints.
        data: an .npz file with inputs by name, or an .npy file with one array of inputs.
        out: the file to write: .npz, .npy, or .csv with a row per example.
        argmax: write the index of the largest output, such as the class, instead of the outputs.
        code: file or module with your classes, such as train.py or package.module.
        weights: "raw", "ema" or "swa"; by default those that the monitor judges.
    """
    if out.suffix not in _OUTPUTS:
        raise ConfigError(f"out must end in .npz, .npy or .csv; got {str(out)!r}.")
    outputs = loaded(run, code).predict(read_data(data), weights=weights)
    if argmax:
        outputs = jax.tree.map(lambda each: np.asarray(each).argmax(axis=-1), outputs)
    leaves = jax.tree.leaves_with_path(outputs)
    arrays = {leaf_name(path) if path else "outputs": np.asarray(x) for path, x in leaves}
    with explained(out, rule="Predictions must be a file that can be {}", other="--out"):
        _write(out, arrays)
    shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in arrays.items())
    print(f"{shown(out.absolute())}: {shapes}")
    return 0


def export(
    run: Run,
    folder: tyro.conf.Positional[Path],
    batch_size: int | None = None,
    code: str | None = None,
    weights: str | None = None,
    license: str | None = None,
) -> int:
    """Exports the best model of a run as StableHLO, to run without Distaff.

    Args:
        run: path of a run, such as runs/digits/0001, or of one of its checkpoints.
        folder: the folder to write; it must not exist.
        batch_size: examples of each call; by default any number.
        code: file or module with your classes, such as train.py or package.module.
        weights: "raw", "ema" or "swa"; by default those that the monitor judges.
        license: identifier of the licence for the model card, such as apache-2.0.
    """
    trainer, found = loaded(run, code), located(run)
    example = example_from(found.record()["example_batch"])
    is_in_run = found.folder.parent.name == "checkpoints"
    target = export_model(
        trainer,
        folder,
        example,
        batch_size=batch_size,
        weights=weights,
        license=license,
        run=found.folder.parent.parent if is_in_run else None,
    )
    print(f"{shown(target)}: README.md, model.jax, weights.npz, model.json, load.py")
    return 0


def loaded(run: Path, code: str | None) -> TrainerModule:
    """Loads the trainer of a run. Its class is a task, or in `code`; no other module is imported.

    Raises:
        ConfigError: the class of the trainer is not known.
        CheckpointError: there is no complete checkpoint.
    """
    if code is not None:
        load_code(code)
    recorded = located(run).record()["trainer"]["$type"]
    module, _, name = str(recorded).partition(":")
    kind = getattr(tasks, name, None) if module.startswith("distaff.tasks") else None
    kind = kind or getattr(sys.modules.get(module), name, None)
    if not (isinstance(kind, type) and issubclass(kind, TrainerModule)):
        raise ConfigError(
            f"The class {name!r} of this run is in the module {module!r}, which is not imported: "
            "names in files never are. Pass its file or module, such as --code train.py."
        )
    return kind.load_from_checkpoint(run)


def read_data(path: Path) -> Any:
    """Reads arrays by name from an .npz file, or one array from an .npy file.

    Raises:
        ConfigError: the file has another ending.
        DataFileError: the file is missing or damaged.
    """
    if path.suffix not in (".npz", ".npy"):
        raise ConfigError(f"Data must be an .npz or .npy file; got {str(path)!r}.")
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.ndarray):
                return found
            return {name: found[name] for name in found.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataFileError(
            f"{str(path)!r} cannot be read as arrays: {error}. Write it with numpy.savez."
        ) from error


def _write(out: Path, arrays: dict[str, np.ndarray]) -> None:
    if out.suffix == ".npz":
        np.savez(out, allow_pickle=False, **arrays)
        return
    if len(arrays) > 1:
        raise ConfigError(
            f"The model has {len(arrays)} outputs, {list(arrays)}; write them to .npz."
        )
    ((name, array),) = arrays.items()
    if out.suffix == ".npy":
        np.save(out, array, allow_pickle=False)
        return
    columns = array.reshape(len(array), -1)
    heads = [name] if columns.shape[1] == 1 else [f"{name}_{i}" for i in range(columns.shape[1])]
    form = "%d" if array.dtype.kind in "iub" else "%.9g"
    np.savetxt(out, columns, fmt=form, delimiter=",", header=",".join(heads), comments="")


def _command(name: str, function: Callable[..., int]) -> Callable[[Sequence[str]], int]:
    def run(words: Sequence[str]) -> int:
        return tyro.cli(function, prog=f"distaff {name}", args=list(words))

    return run


COMMANDS = {
    name: _command(name, function)
    for name, function in {"eval": evaluate, "predict": predict, "export": export}.items()
}
"""Commands by name."""

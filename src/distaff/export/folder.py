"""Writes an exported model: a folder with its program, weights, description and loader."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import tempfile
import zipfile
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from distaff.core.config.encoding import to_json
from distaff.core.files import explained
from distaff.core.paths import as_path
from distaff.core.typing import Batch
from distaff.errors import ConfigError, MissingExtraError, StateError, nearest
from distaff.export.card import RunFacts, call, check_license, model_card
from distaff.export.onnx import export_onnx
from distaff.export.program import ExportedProgram, program_of
from distaff.trainer.module import TrainerModule
from distaff.trainer.predictor import Predictor

PLATFORMS = ("cpu", "cuda", "tpu")

_KNOWN = (*PLATFORMS, "rocm")
_VERSIONS = ("distaff", "jax", "flax", "numpy")


def export_model(
    trainer: Predictor,
    path: str | Path,
    example_batch: Batch,
    *,
    batch_size: int | None = None,
    platforms: tuple[str, ...] = PLATFORMS,
    weights: str | None = None,
    license: str | None = None,
    run: str | Path | None = None,
) -> Path:
    """Exports the outputs of `trainer.predict_fn` as StableHLO, to run without Distaff.

    The folder contains `model.jax` (the program, by `jax.export`), `weights.npz`, `model.json`
    (inputs, outputs, versions, and the coding of a data frame), the model card `README.md`, and
    `load.py`, which needs only JAX, NumPy and flatbuffers:

        from load import load
        outputs = load()(image=images)  # [batch, 8, 8, 1]

    A path that ends in `.onnx` is written as one ONNX file instead, by jax2onnx, and compared with
    the model by onnxruntime, to 1e-5; both packages must be installed.

    Inputs are the leaves of a batch that the outputs depend on, by name; labels are not. JAX can
    read an exported program for at least six months after its version; afterwards, export again.

    Args:
        trainer: a trained or loaded trainer.
        path: the folder to write, or an ONNX file; it must not exist.
        example_batch: a batch as in training, with at least one example; only shapes and dtypes
            count. An array stands for inputs alone.
        batch_size: the number of examples of each call; by default any number.
        platforms: for which platforms, of `"cpu"`, `"cuda"`, `"rocm"` and `"tpu"`.
        weights: see `TrainerModule.evaluation_state`.
        license: identifier of the model's licence for the card, such as `"apache-2.0"`.
        run: the run directory that the card describes; by default that of the trainer's last run.

    Returns:
        The absolute path of the folder or file.

    Raises:
        ConfigError: the folder exists, an argument is wrong, or the model needs a batch size.
        BatchError: the outputs do not depend on the batch.
        StateError: the model has no parameters yet, or does not have this average.
        RunDirectoryError: the folder cannot be written, or there is no run directory.
        MissingExtraError: flatbuffers is not installed, or jax2onnx or onnxruntime for ONNX.
    """
    target = as_path(path, "The path of an exported model")
    is_onnx = target.suffix == ".onnx"
    _check_arguments(path, target, batch_size, platforms, is_onnx)
    if is_onnx:
        if license is not None or run is not None or platforms != PLATFORMS:
            raise ConfigError(
                "An ONNX file has no model card and no platforms: omit license, run and platforms, "
                "or export to a path without .onnx."
            )
        export_onnx(trainer, target, example_batch, batch_size=batch_size, weights=weights)
        return target
    check_license(license)
    program = program_of(
        trainer, example_batch, batch_size=batch_size, platforms=tuple(platforms), weights=weights
    )
    facts: dict[str, Any] = _facts(trainer, program, weights)
    facts |= {"platforms": list(platforms), "batch_size": batch_size}
    card = model_card(facts, program, _run_facts(trainer, run, facts["weights"]), license)
    with explained(target, rule="An exported model must be a folder that can be {}", other="path"):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            _write(folder, program, facts, card)
            folder.chmod(0o775)
            folder.rename(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return target


def _check_arguments(
    path: str | Path,
    target: Path,
    batch_size: int | None,
    platforms: tuple[str, ...],
    is_onnx: bool,
) -> None:
    if not is_onnx and importlib.util.find_spec("flatbuffers") is None:
        raise MissingExtraError(
            "Exporting needs the package 'flatbuffers', which is not installed. Install it with: "
            'pip install "distaff[export]"'
        )
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1; got {batch_size}.")
    for each in platforms:
        if each not in _KNOWN:
            raise ConfigError(f"There is no platform {each!r}. {nearest(each, _KNOWN)}")
    if target.exists():
        raise ConfigError(f"The path {str(path)!r} exists. Export to another one, or remove it.")


def _write(folder: Path, program: ExportedProgram, facts: dict[str, Any], card: str) -> None:
    (folder / "model.jax").write_bytes(program.serialized)
    with zipfile.ZipFile(folder / "weights.npz", "w") as archive:  # np.savez has reserved names
        for name, array in program.weights.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    (folder / "README.md").write_text(card, "utf-8", errors="replace")
    (folder / "model.json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    text = resources.files("distaff.export").joinpath("load.py.txt").read_text("utf-8")
    for mark, value in (("CALL", call(program)), ("JAX", facts["versions"]["jax"])):
        text = text.replace(f"@{mark}@", value)
    (folder / "load.py").write_text(text, "utf-8")


def _facts(trainer: Predictor, program: ExportedProgram, weights: str | None) -> dict[str, Any]:
    return {
        "trainer": type(trainer).__name__,
        "step": trainer.step,
        "weights": weights or trainer._workspace.default_weights(),
        "inputs": program.inputs,
        "outputs": program.outputs,
        "coding": to_json(trainer.config.coding),
        "keeps_apart": program.keeps_apart,
        "num_parameters": int(
            sum(x.size for n, x in program.weights.items() if n.startswith("params/"))
        ),
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
    }


def _run_facts(trainer: Predictor, run: str | Path | None, weights: str) -> RunFacts:
    """Returns what is known about the run of an exported model."""
    if run is None and isinstance(trainer, TrainerModule):
        with suppress(StateError):
            run = trainer.last_run.path
    if run is None:
        return RunFacts()

    def is_of_model(metric: str) -> bool:
        return trainer.config.judged(metric) == weights

    return RunFacts.read(as_path(run, "run"), trainer.step, is_of_model)

"""The commands `distaff eval`, `predict` and `export`: a trained model on data of your own.

Functions import what needs JAX, so that their help starts without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from distaff.core.files import explained
from distaff.core.paths import shown
from distaff.errors import ConfigError, leaf_name

Run = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
Data = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA")]


def evaluate(
    run: Run,
    data: Data,
    columns: tuple[str, ...] = (),
    code: str | None = None,
    weights: str | None = None,
) -> int:
    """Evaluates the best model of a run on data, and prints its metrics.

    Args:
        run: path of a run, such as runs/digits/0001, or of one of its checkpoints.
        data: an .npz file with the arrays of a batch by name, such as image and label; or a .csv
            or .parquet file with these columns, such as x_0, x_1 and label.
        columns: columns of the model's input, in their order, if they have other names; patterns
            such as "pixel*" are possible.
        code: file or module with your classes, such as train.py or package.module.
        weights: "raw", "ema" or "swa"; by default those that the monitor judges.
    """
    import numpy as np

    from distaff.cli import trained

    trainer = trained.loaded(run, code)
    batch = trained.data_of(run, trainer, data, columns, with_targets=True)
    metrics = trainer.eval_model(batch, weights=weights)
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        print(f"{name:<{width}}  {np.array2string(np.asarray(value), precision=6)}")
    return 0


def predict(
    run: Run,
    data: Data,
    out: Path = Path("predictions.npz"),
    columns: tuple[str, ...] = (),
    argmax: bool = False,
    code: str | None = None,
    weights: str | None = None,
) -> int:
    """Writes the outputs of the best model of a run for data.

    Args:
        run: path of a run, such as runs/digits/0001, or of one of its checkpoints.
        data: an .npz file with inputs by name, an .npy file with one array of inputs, or a .csv or
            .parquet file with the columns of the input, such as x_0 and x_1.
        out: the file to write: .npz, .npy, or .csv or .parquet with a row per example.
        columns: columns of the model's input, in their order, if they have other names; patterns
            such as "pixel*" are possible.
        argmax: write the index of the largest output, such as the class, instead of the outputs.
        code: file or module with your classes, such as train.py or package.module.
        weights: "raw", "ema" or "swa"; by default those that the monitor judges.
    """
    import jax
    import numpy as np

    from distaff.cli import trained
    from distaff.cli.files import arrays

    if out.suffix not in arrays.OUTPUTS:
        raise ConfigError(f"out must end in .npz, .npy, .csv or .parquet; got {str(out)!r}.")
    trainer = trained.loaded(run, code)
    batch = trained.data_of(run, trainer, data, columns, with_targets=False)
    outputs = trainer.predict(batch, weights=weights)
    if argmax:
        outputs = jax.tree.map(lambda each: np.asarray(each).argmax(axis=-1), outputs)
    leaves = jax.tree.leaves_with_path(outputs)
    named = {leaf_name(path) if path else "outputs": np.asarray(x) for path, x in leaves}
    with explained(out, rule="Predictions must be a file that can be {}", other="--out"):
        arrays.write(out, named)
    shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in named.items())
    print(f"{shown(out.absolute())}: {shapes}")
    return 0


def export(
    run: Run,
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")],
    batch_size: int | None = None,
    code: str | None = None,
    weights: str | None = None,
    license: str | None = None,
) -> int:
    """Exports the best model of a run as StableHLO or ONNX, to run without Distaff.

    Args:
        run: path of a run, such as runs/digits/0001, or of one of its checkpoints.
        folder: the folder to write, or a file ending in .onnx; it must not exist.
        batch_size: examples of each call; by default any number.
        code: file or module with your classes, such as train.py or package.module.
        weights: "raw", "ema" or "swa"; by default those that the monitor judges.
        license: identifier of the licence for the model card, such as apache-2.0.
    """
    from distaff.checkpoint import located
    from distaff.checkpoint.record import example_from
    from distaff.cli import trained
    from distaff.export import export_model

    trainer, found = trained.loaded(run, code), located(run)
    example = example_from(found.record()["example_batch"])
    is_described = folder.suffix != ".onnx" and found.folder.parent.name == "checkpoints"
    target = export_model(
        trainer,
        folder,
        example,
        batch_size=batch_size,
        weights=weights,
        license=license,
        run=found.folder.parent.parent if is_described else None,
    )
    files = ": README.md, model.jax, weights.npz, model.json, load.py" if target.is_dir() else ""
    print(f"{shown(target)}{files}")
    return 0


def _command(name: str, function: Callable[..., int]) -> Callable[[Sequence[str]], int]:
    def run(words: Sequence[str]) -> int:
        return tyro.cli(function, prog=f"distaff {name}", args=list(words))

    return run


eval_main, predict_main, export_main = (
    _command(name, function)
    for name, function in {"eval": evaluate, "predict": predict, "export": export}.items()
)

"""`distaff eval`, `predict` and `export`: a trained model on data of your own."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from distaff import cli, data, tasks, zoo

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(12, 8, 8, 1)).astype(np.float32)
LABELS = np.arange(12, dtype=np.int32) % 10
CODE = """
import flax.linen as nn
from distaff import tasks

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(x.reshape(len(x), -1))

class Mine(tasks.Classifier):
    pass
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[tasks.Classifier, Path]:
    root = tmp_path_factory.mktemp("trained")
    trainer = tasks.Classifier(
        zoo.MLP((8, 10)), root=root, name="mlp", batch_size=4, enable_progress_bar=False, ema=0.5
    )
    result = trainer.train_model({"image": IMAGES, "label": LABELS}, num_epochs=1)
    return trainer, result.path


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", image=IMAGES, label=LABELS)
    np.save("images.npy", IMAGES)


def test_eval_prints_the_metrics_of_the_trainer(trained, capsys):
    trainer, path = trained
    assert cli.main(("eval", str(path), "data.npz")) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    expected = trainer.eval_model({"image": IMAGES, "label": LABELS})
    assert printed.keys() == expected.keys()
    for name, value in expected.items():
        assert float(printed[name]) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_predict_writes_the_outputs_of_the_trainer(trained, capsys, weights):
    trainer, path = trained
    assert cli.main(("predict", str(path), "images.npy", "--weights", weights)) == 0
    assert capsys.readouterr().out == "predictions.npz: outputs [12, 10]\n"
    expected = trainer.predict(IMAGES, weights=weights)
    np.testing.assert_array_equal(np.load("predictions.npz")["outputs"], expected)


def test_predict_writes_classes_as_csv_and_npy(trained):
    trainer, path = trained
    classes = trainer.predict(IMAGES).argmax(axis=1)
    for out in ("classes.csv", "classes.npy"):
        assert cli.main(("predict", str(path), "data.npz", "--out", out, "--argmax")) == 0
    np.testing.assert_array_equal(np.load("classes.npy"), classes)
    assert Path("classes.csv").read_text().splitlines() == ["outputs", *map(str, classes)]


def test_predict_writes_a_column_per_output(trained):
    trainer, path = trained
    assert cli.main(("predict", str(path), "images.npy", "--out", "logits.csv")) == 0
    head, *rows = Path("logits.csv").read_text().splitlines()
    assert head.split(",") == [f"outputs_{i}" for i in range(10)]
    written = np.array([row.split(",") for row in rows], np.float32)
    np.testing.assert_array_equal(written, trainer.predict(IMAGES))


def test_tables_give_what_arrays_give(trained, capsys):
    trainer, path = trained
    names = [f"image_{place}" for place in range(64)]
    rows = [
        [*image.ravel().tolist(), label, "n"] for image, label in zip(IMAGES, LABELS, strict=True)
    ]
    head = ",".join([*names, "label", "note"])
    Path("data.csv").write_text("\n".join([head, *(",".join(map(str, row)) for row in rows)]))
    logits = trainer.predict(IMAGES)
    assert cli.main(("predict", str(path), "data.csv", "--out", "logits.parquet")) == 0
    assert capsys.readouterr().err == "data.csv: columns not used: label, note\n"
    read = data.ParquetExamples("logits.parquet").read_batch(range(12))
    np.testing.assert_array_equal(np.stack([*read.values()], axis=1), logits)
    assert [*read] == [f"outputs_{place}" for place in range(10)]
    words = ("predict", str(path), "logits.parquet", "--columns", "outputs_*", *["outputs_9"] * 2)
    assert cli.main(words) == 2
    assert "64 values per row" in capsys.readouterr().err
    for file in ("data.csv", "data.npz"):
        assert cli.main(("eval", str(path), file)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[: len(printed) // 2] == printed[len(printed) // 2 :]


def test_failed_write_leaves_the_file_before(trained, monkeypatch, capsys):
    _, path = trained
    Path("out.csv").write_text("before")
    monkeypatch.setattr("csv.writer", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
    assert cli.main(("predict", str(path), "images.npy", "--out", "out.csv")) == 1
    assert "Free some space" in capsys.readouterr().err
    assert Path("out.csv").read_text() == "before"
    assert sorted(each.name for each in Path().iterdir() if each.suffix == ".csv") == ["out.csv"]


def test_export_writes_a_folder(trained, capsys):
    _, path = trained
    assert cli.main(("export", str(path), "exported")) == 0
    assert capsys.readouterr().out.startswith("exported: README.md, model.jax")
    assert (Path("exported") / "load.py").is_file()
    assert cli.main(("export", str(path), "exported")) == 2


def test_class_of_your_own_is_in_the_code_that_you_name(capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("mycode.py").write_text(CODE)
    from distaff.cli.recipes import load_code

    code = load_code("mycode.py")
    trainer = code.Mine(code.Net(), name="mine", batch_size=4, enable_progress_bar=False)
    path = trainer.train_model({"image": IMAGES, "label": LABELS}, num_epochs=1).path
    expected = trainer.predict(IMAGES)
    del sys.modules["mycode"]
    assert cli.main(("predict", str(path), "images.npy")) == 2
    assert "--code train.py" in capsys.readouterr().err
    assert cli.main(("predict", str(path), "images.npy", "--code", "mycode.py")) == 0
    np.testing.assert_array_equal(np.load("predictions.npz")["outputs"], expected)
    del sys.modules["mycode"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("predict", "RUN", "images.npy", "--out", "out.txt"), ".csv"),
        (("predict", "RUN", "data.txt"), ".npz, .npy, .csv or .parquet"),
        (("predict", "RUN", "images.npy", "--columns", "a"), "--columns"),
        (("predict", "RUN", "gone.csv"), "'gone.csv' cannot be read"),
        (("predict", "RUN", "gone.npz"), "numpy.savez"),
        (("predict", "RUN", "broken.npz"), "numpy.savez"),
        (("predict", "gone", "images.npy"), "gone"),
        (("eval", "RUN", "data.npz", "--code", "gone.py"), "no file 'gone.py'"),
        (("eval", "RUN", "data.npz", "--weights", "swa"), "swa"),
    ],
)
def test_wrong_words_are_errors(trained, words, part, capsys):
    Path("broken.npz").write_bytes(b"PK\x03\x04 nothing")
    words = [str(trained[1]) if word == "RUN" else word for word in words]
    assert cli.main(words) in (1, 2)
    assert part in capsys.readouterr().err
    assert not Path("predictions.npz").exists()

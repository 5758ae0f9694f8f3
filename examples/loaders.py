"""One training on the same digits through each kind of loader, stopped within an epoch and resumed.

    .venv/bin/python examples/loaders.py

A resumed run must end with the parameters of one that was not stopped, bit for bit. Loaders of what
is not installed are left out; yours is one more entry in `LOADERS`.
"""

import contextlib
import importlib.util
import io
import signal
import tarfile
import tempfile

import jax
import numpy as np
import tyro

from distaff import Callback, data, tasks, zoo

STEPS, STOP = 19, 45  # steps of an epoch; the last one before Ctrl-C
ARRAYS = {name: array[: 64 * STEPS] for name, array in data.digits()[0].arrays.items()}
FLAT = {"x": ARRAYS["image"].reshape(-1, 64), "label": ARRAYS["label"]}
ROWS = [{name: array[i] for name, array in ARRAYS.items()} for i in range(64 * STEPS)]
BYTES = np.column_stack([FLAT["label"], 16 * FLAT["x"]]).astype(np.uint8)  # a label, 64 pixels


def generator():
    for rows in np.random.default_rng(0).permutation(64 * STEPS).reshape(STEPS, 64):
        yield {name: array[rows] for name, array in ARRAYS.items()}


def mixture():
    halves = [{name: array[i::2] for name, array in ARRAYS.items()} for i in (0, 1)]
    even, odd = (data.ArrayLoader(half, 32, shuffle=True) for half in halves)
    return data.Mixture({"even": even, "odd": odd}, {"even": 1, "odd": 1}, batch_size=64)


def read(examples, decode=None):
    examples = data.MappedExamples(examples, decode) if decode else examples
    return data.from_examples(examples, 64, shuffle=True)


def from_bytes(record):
    label, *pixels = record
    return {"x": np.float32(pixels) / 16, "label": label}


def from_text(line):
    return from_bytes(map(int, line.split()))


def from_files(files):
    return {"image": files["npy"], "label": files["cls"]}


def write_files():
    np.savetxt("digits.txt", BYTES, "%d")
    with tarfile.open("digits.tar", "w") as archive:
        for i, row in enumerate(ROWS):
            np.save(image := io.BytesIO(), row["image"])
            for end, content in {"npy": image.getvalue(), "cls": b"%d" % row["label"]}.items():
                member = tarfile.TarInfo(f"{i:04}.{end}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    if importlib.util.find_spec("pyarrow"):
        from pyarrow import parquet, table

        parquet.write_table(table({**FLAT, "x": [*FLAT["x"]]}), "digits.pq", row_group_size=100)
    if importlib.util.find_spec("array_record"):
        from array_record.python.array_record_module import ArrayRecordWriter

        with contextlib.closing(ArrayRecordWriter("digits.rec", "group_size:64")) as writer:
            for row in BYTES:
                writer.write(row.tobytes())


LOADERS = {  # by name: a package, and what makes a loader with it
    "data.ArrayLoader": ("jax", lambda x: data.ArrayLoader(ARRAYS, 64, shuffle=True)),
    "data.Mixture": ("jax", lambda x: mixture()),
    "data.from_examples": ("jax", lambda x: read(ROWS)),
    "data.TextLines": ("jax", lambda x: read(data.TextLines("digits.txt"), from_text)),
    "data.TarExamples": ("jax", lambda x: read(data.TarExamples("digits.tar"), from_files)),
    "data.ParquetExamples": ("pyarrow", lambda x: read(data.ParquetExamples("digits.pq"))),
    "data.ArrayRecordExamples": (
        "array_record",
        lambda x: read(data.ArrayRecordExamples("digits.rec"), from_bytes),
    ),
    "generator function": ("jax", lambda x: generator),
    "grain.MapDataset": ("grain", lambda x: x.MapDataset.source(ROWS).shuffle(0).batch(64)),
    "grain.IterDataset": ("grain", lambda x: x.MapDataset.source(ROWS).to_iter_dataset().batch(64)),
    "grain.DataLoader": ("grain", lambda x: x.load(ROWS, num_epochs=1, batch_size=64)),
    "torch DataLoader": ("torch", lambda x: x.utils.data.DataLoader(ROWS, 64)),
    "datasets.Dataset": ("datasets", lambda x: data.from_datasets(x.Dataset.from_dict(FLAT), 64)),
    "tf.data.Dataset": ("tensorflow", lambda x: x.data.Dataset.from_tensor_slices(FLAT).batch(64)),
}


class CtrlC(Callback):
    at = 0

    def on_step_end(self, info):
        if info.step == self.at:
            signal.raise_signal(signal.SIGINT)


def train(loader, root, num_epochs, stop=0):
    CtrlC.at = stop
    options = {"root": root, "callbacks": [CtrlC()], "enable_progress_bar": False}
    trainer = tasks.Classifier(zoo.MLP((128, 10)), **options)
    trainer.train_model(loader, num_epochs=num_epochs, steps_per_epoch=STEPS)
    return trainer


def compare(name, package, make, num_epochs):
    loaders = [make(importlib.import_module(package)) for _ in range(3)]
    with tempfile.TemporaryDirectory() as root:
        whole = train(loaders[0], f"{root}/whole", num_epochs)
        train(loaders[1], f"{root}/stopped", num_epochs, STOP)
        resumed = train(loaders[2], f"{root}/stopped", num_epochs)
    params = (jax.tree.leaves(each.state.params) for each in (whole, resumed))
    is_equal = all(map(np.array_equal, *params))
    speed = whole.report.facts()["examples_per_second"]
    print(f"{name:<25}{speed:>10,.0f}  {'yes' if is_equal else 'no'}", flush=True)
    return is_equal


def main(num_epochs: int = 10) -> dict[str, bool]:
    print(f"{'loader':<25}{'examples/s':>10}  resumed run is equal")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_files()
        return {
            name: compare(name, package, make, num_epochs)
            for name, (package, make) in LOADERS.items()
            if importlib.util.find_spec(package)
        }


if __name__ == "__main__":
    tyro.cli(main)

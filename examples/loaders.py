"""One training on the same digits through each kind of loader, stopped within an epoch and resumed.

    .venv/bin/python examples/loaders.py

Both must end with the same bits. Yours is one more entry in `LOADERS`. Files: `file_loaders.py`.
"""

import importlib.util
import signal
import tempfile

import jax
import numpy as np
import tyro

from distaff import Callback, data, tasks, zoo

STEPS, STOP = 19, 45  # steps of an epoch; the last one before Ctrl-C
ARRAYS = {name: array[: 64 * STEPS] for name, array in data.digits()[0].arrays.items()}
FLAT = {"x": ARRAYS["image"].reshape(-1, 64), "label": ARRAYS["label"]}
ROWS = [{name: array[i] for name, array in ARRAYS.items()} for i in range(64 * STEPS)]


def mixture():
    halves = [{name: array[i::2] for name, array in ARRAYS.items()} for i in (0, 1)]
    even, odd = (data.ArrayLoader(half, 32, shuffle=True) for half in halves)
    return data.Mixture({"even": even, "odd": odd}, {"even": 1, "odd": 1}, batch_size=64)


LOADERS = {  # by name: a package, and what makes a loader with it
    "data.ArrayLoader": ("jax", lambda x: data.ArrayLoader(ARRAYS, 64, shuffle=True)),
    "data.Mixture": ("jax", lambda x: mixture()),
    "data.from_examples": ("jax", lambda x: data.from_examples(ROWS, 64, shuffle=True)),
    "any function": ("jax", lambda x: lambda: iter(data.ArrayLoader(ARRAYS, 64, shuffle=True))),
    "grain.MapDataset": ("grain", lambda x: x.MapDataset.source(ROWS).shuffle(0).batch(64)),
    "grain.IterDataset": ("grain", lambda x: x.MapDataset.source(ROWS).to_iter_dataset().batch(64)),
    "grain.DataLoader": ("grain", lambda x: x.load(ROWS, num_epochs=1, batch_size=64)),
    "torch DataLoader": ("torch", lambda x: x.utils.data.DataLoader(ROWS, 64)),
    "datasets.Dataset": ("datasets", lambda x: data.from_datasets(x.Dataset.from_dict(FLAT), 64)),
    "tf.data.Dataset": ("tensorflow", lambda x: x.data.Dataset.from_tensor_slices(FLAT).batch(64)),
}


class CtrlC(Callback):
    def on_step_end(self, info):
        if info.step == self.at:
            signal.raise_signal(signal.SIGINT)


def train(loader, root, num_epochs, stop=0):
    CtrlC.at = stop
    options = {"callbacks": [CtrlC()], "enable_progress_bar": False}
    trainer = tasks.Classifier(zoo.MLP((128, 10)), root=root, **options)
    trainer.train_model(loader, num_epochs=num_epochs, steps_per_epoch=STEPS)
    return trainer


def compare(name, package, make, num_epochs):
    loaders = [make(importlib.import_module(package)) for _ in range(3)]
    with tempfile.TemporaryDirectory() as root:
        whole = train(loaders[0], f"{root}/whole", num_epochs)
        train(loaders[1], f"{root}/stopped", num_epochs, STOP)
        resumed = train(loaders[2], f"{root}/stopped", num_epochs)
    is_equal = all(
        map(np.array_equal, *(jax.tree.leaves(r.state.params) for r in (whole, resumed)))
    )
    speed = whole.last_run.report.facts()["examples_per_second"]
    print(f"{name:<25}{speed:>10,.0f}  {'yes' if is_equal else 'no'}", flush=True)
    return is_equal


def main(num_epochs: int = 10) -> dict[str, bool]:
    print(f"{'loader':<25}{'examples/s':>10}  resumed run is equal")
    found = [(n, *entry) for n, entry in LOADERS.items() if importlib.util.find_spec(entry[0])]
    return {name: compare(name, package, make, num_epochs) for name, package, make in found}


if __name__ == "__main__":
    tyro.cli(main)

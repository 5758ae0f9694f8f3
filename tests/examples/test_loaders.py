"""Each kind of loader goes on within an epoch, and a loader that does not is found out."""

from __future__ import annotations

import importlib.util

import numpy as np


def test_loaders_go_on_bit_for_bit(example, capsys) -> None:
    module = example("loaders")
    kinds = ["generator function", "grain.MapDataset"]
    module.LOADERS = {name: module.LOADERS[name] for name in kinds}
    assert module.main(num_epochs=3) == dict.fromkeys(kinds, True)
    _, *lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(tuple(kinds))]
    assert [row.split()[-1] for row in rows] == ["yes"] * 2


def test_loaders_are_of_packages_that_are_named(example) -> None:
    module = example("loaders")
    assert {package for package, _ in module.LOADERS.values()} == {
        *("jax", "grain", "torch", "datasets", "tensorflow")
    }
    for package, make in module.LOADERS.values():
        if importlib.util.find_spec(package):
            loader = module.data.as_loader(make(importlib.import_module(package)))
            assert len(list(loader)) == module.STEPS


def test_loaders_find_out_one_that_does_not_go_on(example) -> None:
    module = example("loaders")

    class Forgets(module.data.ArrayLoader):
        def set_state(self, state) -> None:
            pass

    def make(_):
        arrays = {name: np.roll(array, 1, axis=0) for name, array in module.ARRAYS.items()}
        return Forgets(arrays, 64, shuffle=True)

    module.LOADERS = {"forgets": ("jax", make)}
    assert module.main(num_epochs=3) == {"forgets": False}

"""Each kind of loader goes on within an epoch, and a loader that does not is found out."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

import numpy as np
import pytest


@pytest.mark.slow
def test_loaders_go_on_bit_for_bit(example, capsys) -> None:
    module = example("loaders")
    kinds = ["data.Mixture", "any function"]
    module.LOADERS = {name: module.LOADERS[name] for name in kinds}
    assert module.main(num_epochs=3) == dict.fromkeys(kinds, True)
    _, *lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(tuple(kinds))]
    assert [row.split()[-1] for row in rows] == ["yes"] * 2


@pytest.mark.slow
@pytest.mark.peer("torch", "datasets", "tensorflow")
@pytest.mark.parametrize("kind", ["torch DataLoader", "datasets.Dataset", "tf.data.Dataset"])
def test_loaders_of_other_libraries_go_on_bit_for_bit(example, kind) -> None:
    module = example("loaders")
    module.LOADERS = {kind: module.LOADERS[kind]}
    assert module.main(num_epochs=3) == {kind: True}


def test_loaders_are_of_packages_that_are_named(example) -> None:
    module = example("loaders")
    assert {package for package, _ in module.LOADERS.values()} == {
        *("jax", "grain", "torch", "datasets", "tensorflow")
    }


@pytest.mark.peer
@pytest.mark.parametrize("name", ["loaders", "file_loaders"])
def test_loaders_yield_each_digit_once(example, name) -> None:
    module = example("loaders")
    if name == "file_loaders":
        module = example(name)
        module.write_files()
    flat = {name: np.asarray(array) for name, array in module.FLAT.items()}
    order = np.lexsort(flat["x"].T)
    for kind, (package, make) in module.LOADERS.items():
        if find_spec(package):
            loader = module.data.as_loader(make(importlib.import_module(package)))
            batches = list(loader)
            assert len(batches) == 19, kind
            x = np.concatenate([batch.get("x", batch.get("image")) for batch in batches])
            x, label = x.reshape(-1, 64), np.concatenate([batch["label"] for batch in batches])
            found = np.lexsort(x.T)
            np.testing.assert_array_equal(x[found], flat["x"][order], kind)
            np.testing.assert_array_equal(label[found], flat["label"][order], kind)


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

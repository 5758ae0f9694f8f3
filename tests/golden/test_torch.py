"""Weights of PyTorch, made once by `torch/make.py`, in three kinds of models, and back."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from distaff import InitFrom
from torch_models import CASES, Case, Loss, first

HERE = Path(__file__).parent / "torch"
EVERY = [(model, kind) for model, kinds in CASES.items() for kind in kinds]


def loaded(model: str, case: Case, **options: Any) -> tuple[Loss, np.ndarray, np.ndarray]:
    """Returns a trainer with the weights of a file, its inputs, and PyTorch's outputs."""
    with np.load(HERE / f"{model}.npz") as arrays:
        x, y = arrays["x"], arrays["y"]
    if x.ndim == 4 and case.channels_last:
        x = np.moveaxis(x, 1, -1)
    x = x.astype(np.int32) if x.dtype == np.int64 else x
    source = options.pop("source", HERE / f"{model}.safetensors")
    init_from = InitFrom(source, rules=case.rules, **options)
    trainer = Loss(case.model(), init_from=init_from, example_batch={"x": x}, root=None, seed=3)
    return trainer, x, y


QUICK = ("encoder-linen", "block-equinox", "convs-nnx", "lstm-equinox")


@pytest.mark.slow_but(*QUICK)
@pytest.mark.parametrize(("model", "kind"), EVERY)
def test_outputs_equal_those_of_pytorch_and_the_file_comes_back(model: str, kind: str) -> None:
    case = CASES[model][kind]
    trainer, x, y = loaded(model, case)
    outputs = trainer.predict([{"x": x}])
    outputs = first(outputs) if outputs.ndim == 4 and case.channels_last else jnp.asarray(outputs)
    np.testing.assert_allclose(outputs, y, rtol=1e-5, atol=1e-5)

    back = load_file(trainer.export_weights("back.safetensors", rules=case.rules))
    file = load_file(HERE / f"{model}.safetensors")
    file = {name: each for name, each in file.items() if "num_batches_tracked" not in name}
    assert set(back) == set(file)
    for name, tensor in file.items():
        assert back[name].dtype == tensor.dtype
        np.testing.assert_array_equal(back[name], exported(name, file), name)


@pytest.mark.parametrize("kind", ["linen", "equinox"])
def test_an_lstm_that_comes_back_has_other_biases_with_the_same_sums_and_outputs(kind: str) -> None:
    case = CASES["lstm"][kind]
    trainer, x, y = loaded("lstm", case)
    path = trainer.export_weights("back.safetensors", rules=case.rules)
    back, file = load_file(path), load_file(HERE / "lstm.safetensors")
    first_biases = sorted(name for name in file if "bias_ih" in name)
    assert first_biases
    for name in first_biases:
        second = name.replace("_ih", "_hh")
        assert (back[name] != file[name]).any()
        assert not back[second].any()
        np.testing.assert_array_equal(back[name] + back[second], file[name] + file[second])
    again, _, _ = loaded("lstm", case, source=path)
    outputs = np.asarray(trainer.predict([{"x": x}]))
    np.testing.assert_array_equal(np.asarray(again.predict([{"x": x}])), outputs)
    np.testing.assert_allclose(outputs, y, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.peer("torch")
@pytest.mark.parametrize(("model", "kind"), EVERY)
def test_pytorch_loads_the_export(model: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import load_file as load_torch_file  # needs PyTorch

    monkeypatch.syspath_prepend(str(HERE))
    classes = importlib.import_module("make")
    case = CASES[model][kind]
    trainer, _, y = loaded(model, case)
    path = trainer.export_weights("back.safetensors", rules=case.rules)
    module = getattr(classes, model.title())()
    module.load_state_dict(load_torch_file(path), strict=True)
    with np.load(HERE / f"{model}.npz") as arrays, torch.no_grad():
        outputs = module.eval()(torch.tensor(arrays["x"])).numpy()
    np.testing.assert_allclose(outputs, y, rtol=1e-6, atol=1e-6)


def exported(name: str, file: dict[str, np.ndarray]) -> np.ndarray:
    """Returns what an export has for a tensor: itself, but for two biases that are summed."""
    tensor = file[name]
    if "bias_ih" not in name and "bias_hh" not in name:
        return tensor
    summed = np.ones(len(tensor), bool)
    summed[12:] = not name.startswith("gru")  # the last gate of a GRU has both biases
    if "bias_hh" in name:
        return np.where(summed, 0, tensor)
    return np.where(summed, tensor + file[name.replace("_ih", "_hh")], tensor)

"""The probe stands on the encoder of an autoencoder's run, which it does not change by a bit."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from distaff import checkpoint
from distaff.checkpoint import CheckpointStore


def params_of(run: Path, like) -> dict:
    directory, step = checkpoint.find(run)
    return CheckpointStore(directory).load(step, {"params": like})["params"]


@pytest.mark.slow
def test_linear_probe_keeps_the_trained_encoder_bit_for_bit(
    example, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, module = example("autoencoder"), example("linear_probe")
    sweep.main(sweep.Options(latents=(6,), num_epochs=2, validate_every=2, root=str(tmp_path)))
    run = tmp_path / "autoencoder" / "0001"

    started = []
    initialise = module.Probing.run_model_init

    def recorded(self, batch, key):
        variables = initialise(self, batch, key)
        started.append(jax.tree.map(np.array, variables.params))
        return variables

    monkeypatch.setattr(module.Probing, "run_model_init", recorded)
    options = module.Options(autoencoder=str(run), num_epochs=2, root=str(tmp_path))
    scores = module.main(options)

    autoencoder = module.tasks.Autoencoder.load_from_checkpoint(run, module.zoo.MLPAutoencoder)
    encoder = autoencoder.state.params["encoder"]
    random_start, trained_start = started
    for name, start in (("random-probe", random_start), ("trained-probe", trained_start)):
        probe = params_of(tmp_path / name / "0001", start)
        assert set(probe) == {"encoder", "head"}
        jax.tree.map(np.testing.assert_array_equal, probe["encoder"], start["encoder"])
        assert not np.array_equal(probe["head"]["kernel"], start["head"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, trained_start["encoder"], encoder)
    kernels = (start["encoder"]["Dense_0"]["kernel"] for start in started)
    assert not np.array_equal(*kernels)

    assert list(scores) == ["random encoder", "trained encoder", "PCA", "pixels"]
    assert scores["random encoder"] < scores["trained encoder"] < scores["pixels"]
    assert scores["PCA"] < scores["pixels"]
    assert f"'pixels': {scores['pixels']:.4f}" in capsys.readouterr().out
    assert (tmp_path / "trained-probe" / "0001" / "accuracy.png").exists()

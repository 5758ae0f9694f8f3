"""A pipeline over four devices computes what one device computes."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest


@pytest.mark.slow
def test_pipeline_is_that_of_one_device(example, tmp_path: Path) -> None:
    module = example("pipeline")
    found, alone = (
        module.main(mesh=mesh, root=str(tmp_path / str(mesh))) for mesh in (True, False)
    )
    assert found.metrics["val/accuracy"] > 0.85
    np.testing.assert_allclose(found.history["train/loss"], alone.history["train/loss"], rtol=2e-6)
    np.testing.assert_allclose(found.history["val/loss"], alone.history["val/loss"], rtol=1e-5)


@pytest.mark.slow
def test_each_device_holds_its_stage(example, tmp_path: Path) -> None:
    module = example("pipeline")
    trainer = module.tasks.Classifier(module.Pipeline(module.MESH), mesh=module.MESH, root=None)
    trainer.init_model({"image": np.zeros((16, 64), np.float32), "label": np.zeros(16, np.int32)})
    stages = trainer.state.params["stages"]
    assert stages.addressable_shards[0].data.shape == (1, 2, 64, 64)
    assert stages.sharding.spec == jax.sharding.PartitionSpec("pipe")

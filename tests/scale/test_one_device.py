"""A mesh of one device costs nothing: XLA compiles the same operations as without a mesh."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest

from distaff import MeshConfig, data, tasks, zoo
from distaff.execution.feed.chunk import One

RANDOM = np.random.default_rng(0)
IMAGES = {
    "image": RANDOM.normal(size=(16, 16)).astype(np.float32),
    "label": RANDOM.integers(4, size=16).astype(np.int32),
}
TOKENS = {"tokens": RANDOM.integers(32, size=(16, 17)).astype(np.int32)}


def operations(kind: str, mesh: Any) -> Counter[tuple[str, ...]]:
    """Returns how often each operation with each shape is in the compiled step of a run."""
    options: dict[str, Any] = {"mesh": mesh, "root": None, "enable_progress_bar": False}
    options |= {"steps_per_call": 1, "log_every_n_steps": 1}
    if kind == "MLP":
        trainer: Any = tasks.Classifier(zoo.MLP((32, 4)), **options)
        arrays: Any = IMAGES
    else:
        model = zoo.GPT(32, features=16, num_layers=1, num_heads=2, max_length=16, dropout=0.1)
        trainer, arrays = tasks.LanguageModel(model, **options), TOKENS
    trainer.train_model(data.ArrayLoader(arrays, 16), num_epochs=1)
    dispatcher = trainer._run.dispatcher
    place = dispatcher.placement
    batch = arrays if place.batch is None else place.batch(arrays)
    state = place.state(trainer.state)
    traced = dispatcher._one.trace(state, dispatcher.blank.rows, One(batch))
    lowered = traced.lower()
    if mesh is not None:  # no pins, which XLA would remove
        assert not re.search(r"sharding_constraint \S+ <@mesh,", lowered.as_text())
    text = lowered.compile().as_text()
    assert jax.tree.leaves(state.params)[0].sharding.num_devices == 1
    return Counter(re.findall(r" = (\S+) ([a-z-]+)\(", text))


@pytest.mark.parametrize("kind", ["MLP", "GPT"])
@pytest.mark.slow_but("MLP")
def test_step_on_a_mesh_of_one_device_has_the_operations_of_one_without(kind: str) -> None:
    found = operations(kind, MeshConfig(1))
    assert found == operations(kind, None)
    assert sum(found.values()) > 100

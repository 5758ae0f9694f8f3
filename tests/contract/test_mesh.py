"""A placement over a mesh, written here: a run trains, validates, saves and resumes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import distaff
from distaff import data, tasks, zoo
from distaff.execution.execution import Compiled
from distaff.execution.feed.chunk import Stacked
from distaff.execution.placement import Placement

SIZE = 4
RANDOM = np.random.default_rng(0)
ROWS = {
    "image": RANDOM.normal(size=(6 * SIZE, 6)).astype(np.float32),
    "label": RANDOM.integers(4, size=6 * SIZE).astype(np.int32),
}


class Meshed:
    """Batches are split over the devices of a mesh, and so are kernels, by their last axis."""

    gathers = False

    def __init__(self) -> None:
        kind = jax.sharding.AxisType.Auto
        self._mesh = jax.make_mesh((SIZE,), ("data",), axis_types=(kind,))

    def alongside(self, batch: Any) -> Placement:
        return self

    def state(self, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.device_put(leaf, self._of_state(leaf)), tree)

    def replicated(self, tree: Any) -> Any:
        return jax.device_put(tree, self._named())

    def batch(self, source: Any) -> Any:
        axes = (None, "data") if isinstance(source, Stacked) else ("data",)
        return jax.device_put(source, self._named(*axes))

    def resident(self, tree: Any) -> Any:
        return self.batch(tree)

    def _of_state(self, leaf: Any) -> NamedSharding:
        is_split = np.ndim(leaf) == 2 and not leaf.shape[1] % SIZE
        return self._named(None, "data") if is_split else self._named()

    def _named(self, *axes: str | None) -> NamedSharding:
        return NamedSharding(self._mesh, PartitionSpec(*axes))


def trained(epochs: int = 2, **options: Any) -> tuple[Any, Any]:
    trainer = tasks.Classifier(
        zoo.MLP((8, 4)),
        optimizer=distaff.OptimizerConfig("adamw", learning_rate=1e-2),
        enable_progress_bar=False,
        log_every_n_steps=2,
        recompile="error",
        **options,
    )
    loader = data.ArrayLoader(ROWS, 2 * SIZE, shuffle=True)
    result = trainer.train_model(loader, data.ArrayLoader(ROWS, 2 * SIZE), num_epochs=epochs)
    return trainer, result


@pytest.fixture
def on_mesh(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Returns what has the trainers after it use a mesh."""
    name = "distaff.run.workspace.Compiled"
    return lambda: monkeypatch.setattr(name, lambda: Compiled(Meshed()))


def test_run_over_a_mesh_is_that_of_one_device(on_mesh: Callable[[], None]) -> None:
    one, expected = trained(steps_per_call=3)
    on_mesh()
    many, result = trained(steps_per_call=3)
    kernel = many.state.params["Dense_0"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "data")
    loader = data.ArrayLoader(ROWS, 2 * SIZE)
    found = many.state.params, dict(result.metrics), many.predict(loader)
    wanted = one.state.params, dict(expected.metrics), one.predict(loader)
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # sums are in another order


@pytest.mark.slow
def test_averages_of_weights_over_a_mesh_are_those_of_one_device(
    on_mesh: Callable[[], None],
) -> None:
    options = {"steps_per_call": 3, "ema": 0.9, "swa_from_epoch": 1}
    one, expected = trained(**options)
    on_mesh()
    many, result = trained(**options)
    kernel = many.state.averages["ema"].values["params"]["Dense_0"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "data")
    found, wanted = (x.state.averages for x in (many, one))
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert result.metrics["val_ema/loss"] == pytest.approx(expected.metrics["val_ema/loss"], 1e-4)


class Steps(distaff.Callback):
    """Notes steps, and interrupts the run after one of them."""

    def __init__(self, last: int = 0) -> None:
        self.last, self.seen = last, []

    def on_step_end(self, info: distaff.StepInfo) -> None:
        self.seen.append(info.step)
        if info.step == self.last:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_run_over_a_mesh_resumes_bit_for_bit(on_mesh: Callable[[], None]) -> None:
    on_mesh()
    whole, _ = trained(steps_per_call=1)
    with pytest.raises(KeyboardInterrupt):
        trained(name="run", callbacks=[Steps(last=4)])
    steps = Steps()
    resumed, _ = trained(name="run", callbacks=[steps])
    assert steps.seen == [4, 5, 6]  # after the checkpoint of the first epoch
    for a, b in zip(*(jax.tree.leaves(x.state.params) for x in (resumed, whole)), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)

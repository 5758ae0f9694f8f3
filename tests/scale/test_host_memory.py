"""The optimizer's state and averages in host memory between steps: the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distaff
from distaff import MeshConfig, data, tasks, zoo
from distaff.errors import ConfigError
from distaff.mesh.placement import OnMesh
from distaff.step.state import TrainState

IMAGE = np.random.default_rng(0).normal(size=(80, 16)).astype(np.float32)
ROWS = {"image": IMAGE, "label": IMAGE[:, :4].argmax(axis=1).astype(np.int32)}
ONE, MANY = {"data": 1}, {"data": 1, "fsdp": 4, "tensor": 2}
FREE = distaff.OptimizerConfig("schedule_free_adamw", learning_rate=1e-2)


def trained(sizes: Any, offload: Any, epochs: int = 2, **options: Any) -> Any:
    given = {"root": None, "ema": 0.9, "recompile": "error", "log_every_n_steps": 1, **options}
    trainer = tasks.Classifier(
        zoo.MLP((64, 32, 4)),
        mesh=MeshConfig(**sizes, offload=offload),
        enable_progress_bar=False,
        **given,
    )
    train = data.ArrayLoader(ROWS, 16, shuffle=True)
    result = trainer.train_model(train, data.ArrayLoader(ROWS, 16), num_epochs=epochs)
    return trainer, result


def in_host_memory(trainer: Any) -> list[tuple[int, ...]]:
    """Returns the shapes of the arrays of the state that are in host memory."""
    leaves = jax.tree.leaves(trainer.state)
    return [leaf.shape for leaf in leaves if leaf.sharding.memory_kind == "pinned_host"]


def assert_same_bits(one: Any, other: Any) -> None:
    for a, b in zip(*map(jax.tree.leaves, (one.state, other.state)), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        pytest.param(ONE, {"steps_per_call": 3}, id="one"),
        pytest.param(ONE, {"debug": True}, id="debug"),
        pytest.param(MANY, {"debug": True}, id="debug many"),
        pytest.param(MANY, {"steps_per_call": 3}, id="many"),
        pytest.param(MANY, {"steps_per_call": 1, "on_bad_numbers": "skip"}, id="skip"),
        pytest.param(MANY, {"precision": "bf16", "swa_from_epoch": 2}, id="bf16"),
        pytest.param(MANY, {"optimizer": FREE}, id="free"),
    ],
)
@pytest.mark.slow
def test_run_has_the_bits_of_one_without(
    sizes: Any, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on an accelerator, which computes on arrays instead of reading them.
    monkeypatch.setattr("distaff.step.finite.are_near", lambda leaves: False)
    plain, expected = trained(sizes, None, **options)
    trainer, result = trained(sizes, "optimizer", **options)
    assert not in_host_memory(plain)
    kernels = {(16, 64), (64, 32)}  # larger than `min_size`; not (32, 4), nor biases
    assert set(in_host_memory(trainer)) == kernels
    assert all(
        leaf.sharding.memory_kind == "device" for leaf in jax.tree.leaves(trainer.state.params)
    )
    assert_same_bits(trainer, plain)
    assert result.metrics == expected.metrics
    trainer.train_model(data.ArrayLoader(ROWS, 16, shuffle=True), num_epochs=1)
    assert set(in_host_memory(trainer)) == kernels
    predictions = trainer.predict(ROWS["image"], weights="ema")
    assert np.isfinite(predictions).all()


@pytest.mark.slow
def test_run_resumes_with_and_without(tmp_path: Path) -> None:
    expected, _ = trained(MANY, None, 4)
    for n, (first, then) in enumerate((("optimizer", None), (None, "optimizer"))):
        options = {"root": tmp_path / str(n), "name": "run", "recompile": "error"}
        trained(MANY, first, 2, **options)
        resumed, _ = trained(MANY, then, 4, **options)
        assert resumed.step == expected.step
        assert_same_bits(resumed, expected)


def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
    moment = 0.9 * state.opt_state + batch["x"].mean() * state.params
    return state.replace(params=state.params - moment, opt_state=moment), {}


@pytest.mark.parametrize("sizes", [ONE, MANY], ids=["one", "many"])
def test_each_step_of_a_program_copies_the_arrays_and_donates_them(sizes: Any) -> None:
    place = OnMesh(MeshConfig(**sizes, offload="optimizer"))
    update = place.updating(step)

    def three(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        return jax.lax.fori_loop(0, 3, lambda _, state: update(state, batch)[0], state), {}

    batch = place.batch({"x": np.ones((8, 4), np.float32)})
    for function in (update, place.keeping(three)):
        state = TrainState(
            step=jnp.int32(0), params=jnp.ones((64, 64)), opt_state=jnp.ones((64, 64))
        )
        state = place.state(state)
        program = jax.jit(function, donate_argnums=0)
        text = program.trace(state, batch).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count('_xla_buffer_placement = "device"') == 1  # of the moment alone
        assert text.count('_xla_buffer_placement = "pinned_host"') == 1
        body = text.partition("} do {")[2] if function is not update else text
        assert body.count("annotate_device_placement") == 2  # in the loop, not around it
        after, _ = program(state, batch)
        assert state.opt_state.is_deleted()
        assert state.params.is_deleted()
        assert after.opt_state.sharding.memory_kind == "pinned_host"
        assert after.params.sharding.memory_kind == "device"


def test_devices_without_host_memory_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distaff.mesh.host_memory._KIND", "other_host")
    with pytest.raises(ConfigError, match=r"memory of the kind 'other_host'.*for cpu devices"):
        OnMesh(MeshConfig(offload="optimizer"))


def test_offload_has_one_value() -> None:
    with pytest.raises(ConfigError, match="must be 'optimizer' or None; got True"):
        MeshConfig(offload=True)  # ty: ignore[invalid-argument-type]

"""A run on a mesh of eight simulated devices equals the run on one device."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from typing import Any

import equinox as eqx
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import distaff
from distaff import MeshConfig, data, tasks, tune, zoo
from distaff.errors import ConfigError, NonFiniteError

BATCH = 16
RANDOM = np.random.default_rng(0)
ROWS = {
    "image": RANDOM.normal(size=(5 * BATCH + 4, 16)).astype(np.float32),
    "label": RANDOM.integers(4, size=5 * BATCH + 4).astype(np.int32),
}
IMAGES = {
    "image": RANDOM.normal(size=(4 * BATCH, 8, 8, 3)).astype(np.float32)
    * np.exp(RANDOM.normal(size=(4 * BATCH, 1, 1, 1))).astype(np.float32),
    "label": RANDOM.integers(4, size=4 * BATCH).astype(np.int32),
}
TOKENS = np.tile(RANDOM.integers(32, size=(4 * BATCH, 9)), 2).astype(np.int32)[:, :17]

MESHES = {
    "dp": PartitionSpec(),
    "fsdp": PartitionSpec(None, "fsdp"),
    "tp": PartitionSpec(None, "tensor"),
    "fsdp+tp": PartitionSpec("fsdp", "tensor"),
}


ADAMW = distaff.OptimizerConfig("adamw", learning_rate=1e-2)
SGD = distaff.OptimizerConfig("sgd", learning_rate=1e-1)
"""Adam's first updates have one size: a rounding in half precision may change their sign."""


def classifier(model: Any = None, **options: Any) -> tasks.Classifier:
    return tasks.Classifier(
        model or zoo.MLP((32, 64, 4)),
        enable_progress_bar=False,
        log_every_n_steps=2,
        **{"optimizer": ADAMW, "recompile": "error", **options},
    )


def trained(model: Any = None, epochs: int = 2, **options: Any) -> tuple[Any, Any]:
    trainer = classifier(model, **options)
    train = data.ArrayLoader(ROWS, BATCH, shuffle=True)
    result = trainer.train_model(train, data.ArrayLoader(ROWS, BATCH), num_epochs=epochs)
    return trainer, result


def losses(result: Any) -> np.ndarray:
    return np.asarray(result.history["train/loss"])


def floats(metrics: Any) -> dict[str, float]:
    return {name: float(x) for name, x in metrics.items() if np.ndim(x) == 0}


def digest(tree: Any) -> str:
    """Returns a digest of the bits of all arrays, wherever they are."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        found.update(np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes())
    return found.hexdigest()


def assert_close(found: Any, wanted: Any) -> None:
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # sums are in another order


@pytest.fixture(scope="module")
def one() -> tuple[Any, Any]:
    """A run on one device."""
    return trained(steps_per_call=3, root=None)


@pytest.mark.parametrize("mesh", [*MESHES, MeshConfig(2, fsdp=2, tensor=2), MeshConfig(1)], ids=str)
@pytest.mark.slow_but("fsdp+tp")
def test_run_on_a_mesh_is_that_of_one_device(one: tuple[Any, Any], mesh: Any) -> None:
    trainer, expected = one
    many, result = trained(steps_per_call=3, root=None, mesh=mesh)
    kernel = many.state.params["Dense_1"]["kernel"]
    alike = [x for x in jax.tree.leaves(many.state.opt_state) if x.shape == kernel.shape]
    if mesh in MESHES:
        assert kernel.sharding.is_equivalent_to(
            jax.NamedSharding(kernel.sharding.mesh, MESHES[mesh]), 2
        )
    assert len(alike) == 2  # both moments of Adam
    assert all(moment.sharding.is_equivalent_to(kernel.sharding, 2) for moment in alike)
    loader = data.ArrayLoader(ROWS, BATCH)
    assert_close(many.state.params, trainer.state.params)
    assert_close(floats(result.metrics), floats(expected.metrics))
    assert_close(many.predict(loader), trainer.predict(loader))
    assert_close(floats(many.eval_model(loader)), floats(trainer.eval_model(loader)))


def run_of(kind: str, mesh: Any) -> tuple[str, np.ndarray]:
    """Returns a digest of the initial parameters, and the loss of each of 100 steps."""
    options = {"mesh": mesh, "root": None, "enable_progress_bar": False, "recompile": "error"}
    options |= {"log_every_n_steps": 1}
    adamw = distaff.OptimizerConfig("adamw", learning_rate=3e-3)
    if kind == "GPT":
        arrays: Any = {"tokens": TOKENS}
        model = zoo.GPT(32, features=32, num_layers=2, num_heads=4, max_length=32, dropout=0.1)
        trainer: Any = tasks.LanguageModel(model, optimizer=adamw, **options)
    else:
        arrays = IMAGES
        model = zoo.ResNet(4, blocks=(1, 1), features=(8, 16))
        trainer = tasks.Classifier(model, optimizer=adamw, **options)
    trainer.init_model(jax.tree.map(lambda leaf: leaf[:BATCH], arrays))
    first = digest(trainer.state.params)
    loader = data.ArrayLoader(arrays, BATCH, shuffle=True)
    return first, losses(trainer.train_model(loader, num_epochs=25))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "meshes"), [("GPT", ("dp", "fsdp+tp")), ("ResNet", ("fsdp", "tp"))]
)
def test_losses_of_a_hundred_steps_are_those_of_one_device(
    kind: str, meshes: tuple[str, ...]
) -> None:
    first, expected = run_of(kind, None)
    assert expected[-1] < 0.9 * expected[0]
    for mesh in meshes:
        found, result = run_of(kind, mesh)
        assert found == first  # the same bits on any mesh
        np.testing.assert_allclose(result, expected, rtol=2e-6, err_msg=mesh)


def nnx_model(rngs: nnx.Rngs) -> nnx.Module:
    layers = nnx.Linear(16, 64, rngs=rngs), nnx.relu, nnx.Linear(64, 4, rngs=rngs)
    return nnx.Sequential(*layers)


@pytest.mark.slow
@pytest.mark.parametrize("model", [nnx_model, lambda key: eqx.nn.MLP(16, 4, 64, 2, key=key)])
def test_other_models_train_on_a_mesh(model: Any) -> None:
    trainer, expected = trained(model, root=None)
    many, result = trained(model, root=None, mesh="fsdp")
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(many.state.params))
    assert_close(floats(result.metrics), floats(expected.metrics))
    assert_close(many.state.params, trainer.state.params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"ema": 0.9, "swa_from_epoch": 1},
        {"precision": "bf16", "optimizer": SGD},
        {"precision": "fp16", "optimizer": SGD, "on_bad_numbers": "skip"},
        {"remat": "dots_saveable"},
        {"log_norms": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_hold_on_a_mesh(options: dict[str, Any]) -> None:
    trainer, expected = trained(root=None, steps_per_call=1, **options)
    many, result = trained(root=None, steps_per_call=1, mesh="fsdp+tp", **options)
    tolerance = 2e-2 if "precision" in options else 1e-4
    for name, value in expected.metrics.items():
        assert result.metrics[name] == pytest.approx(value, tolerance), name
    if trainer.state.averages:
        kernel = many.state.averages["ema"].values["params"]["Dense_1"]["kernel"]
        assert kernel.sharding.spec == PartitionSpec("fsdp", "tensor")


@pytest.mark.slow
def test_debugging_on_a_mesh() -> None:
    few = data.ArrayLoader({name: rows[:BATCH] for name, rows in ROWS.items()}, BATCH)
    expected, found = (
        classifier(root=None, debug=True, mesh=mesh).train_model(few, num_epochs=1)
        for mesh in (None, "fsdp")
    )
    assert found.metrics["train/loss"] == pytest.approx(expected.metrics["train/loss"], 1e-5)


class Interrupt(distaff.Callback):
    """Interrupts the run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, info: distaff.StepInfo) -> None:
        if info.step == self.step:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_run_on_a_mesh_resumes_bit_for_bit_and_on_another_mesh(tmp_path: Any) -> None:
    options = {"root": tmp_path, "mesh": "fsdp+tp", "steps_per_call": 1}
    whole, _ = trained(**options, name="whole", epochs=3, callbacks=[Interrupt(0)])
    for name in ("same", "other"):
        with pytest.raises(KeyboardInterrupt):
            trained(**options, name=name, epochs=3, callbacks=[Interrupt(8)])
    options["callbacks"] = [Interrupt(0)]
    resumed, result = trained(**options, name="same", epochs=3)
    assert result.first_step > 0
    for a, b in zip(*(jax.tree.leaves(x.state.params) for x in (resumed, whole)), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)
    moved, result = trained(**{**options, "mesh": "dp"}, name="other", epochs=3)
    assert result.first_step > 0
    assert_close(moved.state.params, whole.state.params)


@pytest.mark.slow
def test_checkpoint_loads_with_equal_bits_on_any_mesh(tmp_path: Any) -> None:
    saved, result = trained(root=tmp_path, mesh="fsdp+tp")
    expected = digest(saved.state)
    few = [MeshConfig(1, fsdp=size) for size in (8, 4, 2)]
    for mesh in (None, "dp", "tp", *few):
        again = classifier(root=None, mesh=mesh, example_batch={n: x[:8] for n, x in ROWS.items()})
        loaded = tasks.Classifier.load_from_checkpoint(result.path, mesh=mesh)
        assert digest(loaded.state.params) == digest(saved.state.params)
        again.load_weights(result.path)
        assert digest(again.state.params) == digest(saved.state.params)
        where = loaded.state.params["Dense_1"]["kernel"].sharding
        assert where.is_equivalent_to(again.state.params["Dense_1"]["kernel"].sharding, 2)
    assert digest(saved.state) == expected


def collectives(pin: bool) -> dict[str, int]:
    """Counts the collectives of a step of a GPT under FSDP."""
    batch = {"tokens": np.zeros((BATCH, 33), np.int32)}
    model = zoo.GPT(64, features=128, num_layers=1, num_heads=4, max_length=32)
    options = {"mesh": MeshConfig(1, fsdp=-1, pin=pin), "root": None, "enable_progress_bar": False}
    trainer = tasks.LanguageModel(model, example_batch=batch, **options)
    trainer.init_optimizer(10)
    here = trainer._workspace
    place = here.execution.placement.batch
    text = jax.jit(here.measured_step).lower(trainer.state, place(batch)).compile().as_text()
    return {name: text.count(f" {name}(") for name in ("all-gather", "all-to-all")}


@pytest.mark.slow
def test_activations_are_not_gathered() -> None:
    pinned, free = collectives(pin=True), collectives(pin=False)
    assert 2 * pinned["all-gather"] <= free["all-gather"]
    assert 4 * pinned["all-to-all"] < free["all-to-all"]


@pytest.mark.slow
def test_run_on_a_mesh_loads_in_a_process_with_one_device(tmp_path: Any) -> None:
    result = trained(root=tmp_path, mesh="fsdp+tp", simulate_devices=8, epochs=1)[1]
    program = (
        "import sys, jax, numpy as np\n"
        "from distaff import tasks\n"
        "jax.devices()\n"
        "trainer = tasks.Classifier.load_from_checkpoint(sys.argv[1])\n"
        "rows = trainer.predict(np.zeros((3, 16), np.float32))\n"
        "print(rows.shape, trainer.config.mesh, jax.device_count())\n"
    )
    command = [sys.executable, "-c", program, str(result.path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "(3, 4) None 1\n", done.stderr


def test_what_measures_one_device_names_the_remedy() -> None:
    trainer, train = classifier(mesh="dp", root=None), data.ArrayLoader(ROWS, BATCH)
    with pytest.raises(ConfigError, match=r"Pass trainer.variant\(mesh=None\)"):
        tune.find_batch_size(trainer, train)
    with pytest.raises(ConfigError, match="multi_seed does not support mesh='dp'"):
        tune.multi_seed(trainer, train, seeds=2, num_epochs=1)


def test_batches_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"20 examples does not divide over the 8.*such as 24"):
        classifier(mesh="dp", root=None).train_model(data.ArrayLoader(ROWS, 20), num_epochs=1)


def test_bad_number_on_a_mesh_is_explained() -> None:
    bad = {**ROWS, "image": np.where(ROWS["image"] > 2.0, np.nan, ROWS["image"])}
    trainer = classifier(mesh="fsdp", root=None, on_bad_input="ignore", recompile="ignore")
    with pytest.raises(NonFiniteError, match="NaN"):
        trainer.train_model(data.ArrayLoader(bad, BATCH), num_epochs=1)


def test_run_says_on_which_devices(capsys: Any) -> None:
    trainer = tasks.Classifier(zoo.MLP((4,)), mesh="fsdp+tp")
    result = trainer.train_model(data.ArrayLoader(ROWS, BATCH), num_epochs=1)
    line = "8 cpu devices: fsdp=4, tensor=2"
    assert capsys.readouterr().out.count(line) == 1
    assert (result.path / "log.txt").read_text("utf-8").count(line) == 1

"""Parameters are split by the names that a module gives to their axes."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.nnx as nnx
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import distaff
from distaff import MeshConfig, data, tasks
from distaff.errors import ConfigError
from distaff.mesh.rules import ShardingRules
from distaff.models import as_model
from distaff.models.linen_collections import recording_axis_names

RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.normal(size=(80, 16)).astype(np.float32)
ROWS = {"image": IMAGE, "label": IMAGE[:, :4].argmax(axis=1).astype(np.int32)}
FEW = jax.tree.map(lambda leaf: leaf[:16], ROWS)
RULES = {"embed": "fsdp", "mlp": "tensor"}
INIT = nn.initializers.lecun_normal()
NAMES = {"Dense_0/kernel": ("embed", "mlp"), "Dense_1/kernel": ("mlp", None), "Dense_0/bias": None}
PARAMS = {
    "Dense_0": {"kernel": np.zeros((16, 64)), "bias": np.zeros(64)},
    "Dense_1": {"kernel": np.zeros((64, 4))},
}


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        first = nn.with_logical_partitioning(INIT, ("embed", "mlp"))
        x = nn.relu(nn.Dense(64, kernel_init=first)(x))
        return nn.Dense(4, kernel_init=nn.with_partitioning(INIT, ("mlp", None)))(x)


def of_nnx(rngs: nnx.Rngs) -> nnx.Module:
    first = nnx.with_partitioning(INIT, ("embed", "mlp"))
    last = nnx.with_partitioning(INIT, ("mlp", None))
    return nnx.Sequential(
        nnx.Linear(16, 64, kernel_init=first, rngs=rngs),
        nnx.relu,
        nnx.Linear(64, 4, kernel_init=last, rngs=rngs),
    )


class OwnInit(tasks.Classifier):
    """Returns collections with boxes."""

    def run_model_init(self, example_batch: Any, key: Any) -> Any:
        return Linen().init(key, example_batch["image"])


def classifier(model: Any, mesh: Any, cls: Any = tasks.Classifier) -> Any:
    return cls(
        model,
        mesh=mesh,
        root=None,
        enable_progress_bar=False,
        log_every_n_steps=1,
        recompile="error",
        ema=0.9,
        optimizer=distaff.OptimizerConfig("adamw", learning_rate=1e-2),
    )


def named(**options: Any) -> MeshConfig:
    return MeshConfig(1, **{"fsdp": 4, "tensor": 2, "axis_rules": RULES, **options})


def specs(tree: Any, shape: tuple[int, ...]) -> list[PartitionSpec]:
    return [leaf.sharding.spec for leaf in jax.tree.leaves(tree) if leaf.shape == shape]


def initialized(mesh: Any, model: Any = None, cls: Any = tasks.Classifier) -> Any:
    trainer = classifier(model or Linen(), mesh, cls)
    trainer.init_model(FEW)
    return trainer.state.params


@pytest.mark.parametrize("cls", [tasks.Classifier, OwnInit])
@pytest.mark.slow_but("Classifier")
def test_parameters_are_split_by_name_with_the_bits_of_one_device(cls: Any) -> None:
    found, expected = initialized(named(), cls=cls), initialized(None, cls=cls)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert specs(found, (16, 64)) == [PartitionSpec("fsdp", "tensor")]
    assert specs(found, (64, 4)) == [PartitionSpec("tensor")]
    assert not any(isinstance(x, nn.meta.AxisMetadata) for x in found["Dense_0"].values())


@pytest.mark.slow
@pytest.mark.parametrize("model", [Linen(), of_nnx], ids=["linen", "nnx"])
def test_losses_are_those_of_one_device_and_the_optimizer_follows(model: Any) -> None:
    losses = []
    for mesh in (None, named()):
        trainer = classifier(model, mesh)
        result = trainer.train_model(data.ArrayLoader(ROWS, 16, shuffle=True), num_epochs=20)
        losses.append(np.asarray(result.history["train/loss"]))
    assert losses[0][-1] < 0.1 * losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-6)
    arrays = trainer.state.params, trainer.state.opt_state, trainer.state.averages
    assert specs(arrays, (16, 64)) == 4 * [PartitionSpec("fsdp", "tensor")]  # moments and EMA
    assert specs(arrays, (64, 4)) == 4 * [PartitionSpec("tensor")]


def test_nnx_module_with_names_is_created_without_a_mesh() -> None:
    with recording_axis_names() as names:
        as_model(of_nnx).init(jax.random.key(0))
    expected = {"0/kernel": ("embed", "mlp"), "2/kernel": ("mlp", None)}
    expected |= {"0/bias": None, "2/bias": None}
    assert names == {f"layers/{path}": each for path, each in expected.items()}


@pytest.mark.parametrize(
    ("rules", "names", "expected"),
    [
        ((("a", "fsdp"), ("b", "fsdp")), ("b", "a"), (None, "fsdp")),  # the first rule decides
        ((("a", "fsdp"), ("a", "tensor")), ("a", "a"), ("fsdp", "tensor")),
        ((("a", None), ("a", "tensor")), ("a",), ()),
        ({"a": ("fsdp", "tensor"), "b": "tensor"}, ("b", "a"), (None, ("fsdp", "tensor"))),
        ({"a": "tensor"}, (None, "a"), (None, "tensor")),
    ],
)
def test_first_rule_decides_and_a_mesh_axis_is_used_once(
    rules: Any, names: tuple[Any, ...], expected: tuple[Any, ...]
) -> None:
    config = named(axis_rules=rules)
    place = ShardingRules(config, config.mesh(), {"x/kernel": names, "kernel": None})
    shape = (64,) * len(names)
    assert place.spec("params/x/kernel", shape) == PartitionSpec(*expected)
    assert place.spec("opt_state/0/mu/x/kernel", shape) == PartitionSpec(*expected)
    # A factor of an optimizer has another shape, and the other kernel has no names.
    assert place.spec("opt_state/0/v/x/kernel", (3,)) == PartitionSpec()
    assert place.spec("params/kernel", (64, 64)) == PartitionSpec("fsdp", "tensor")


def test_rule_of_a_path_comes_before_names_which_then_need_none() -> None:
    config = named(rules={"Dense_0/kernel": ("tensor",)}, axis_rules={"mlp": "tensor"})
    place = ShardingRules(config, config.mesh(), NAMES)
    place.check(PARAMS)
    assert place.spec("params/Dense_0/kernel", (16, 64)) == PartitionSpec("tensor")
    assert place.spec("params/Dense_1/kernel", (64, 4)) == PartitionSpec("tensor")


def test_names_are_ignored_without_rules_for_them() -> None:
    assert specs(initialized("fsdp"), (16, 64)) == [PartitionSpec(None, "fsdp")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis_rules": {"embed": "fsdp"}}, r"no rule for.*'mlp' \(of 'Dense_0/kernel'\)\. Add"),
        ({"axis_rules": {**RULES, "heads": None}}, "rule for 'heads', but no parameter.*'embed'"),
        ({"fsdp": 3}, r"split 'params/Dense_0/kernel' of shape \(16, 64\) as .*16 does not divide"),
    ],
)
def test_names_and_rules_that_do_not_belong_together(options: Any, message: str) -> None:
    config = named(**options)
    with pytest.raises(ConfigError, match=message):
        ShardingRules(config, config.mesh(), NAMES).check(PARAMS)


def test_model_without_names_is_told_how_to_give_them() -> None:
    with pytest.raises(ConfigError, match=r"A module names axes by nn\.with_logical_partitioning"):
        initialized(named(), distaff.zoo.MLP((32, 4)))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (3, "must be a dict of axis names and mesh axes, such as .*; got 3"),
        (("embed", "fsdp"), "got 'embed' in it"),
        ({1: "fsdp"}, r"got \(1, 'fsdp'\) in it"),
        ({"embed": "model"}, "names 'model', which is not an axis of the mesh"),
        ({"embed": ("fsdp", "fsdp")}, "uses a mesh axis twice"),
    ],
)
def test_what_is_no_rule_for_names(rules: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MeshConfig(axis_rules=rules)

"""A mesh and its rules: which axis of an array is split, and what is an error."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from distaff import MeshConfig, TrainerConfig, tasks, zoo
from distaff.core.config.encoding import to_json
from distaff.core.digest import program_digest
from distaff.errors import ConfigError
from distaff.execution.placement import unplaced
from distaff.mesh.options import MeshOptions, simulate
from distaff.mesh.placement import OnMesh
from distaff.mesh.rules import ShardingRules
from distaff.run.identity.comparison import compare_records


def layout(**options: object) -> ShardingRules:
    config = MeshConfig(1, **options)
    return ShardingRules(config, config.mesh())


@given(
    shape=st.lists(st.integers(1, 48), max_size=4).map(tuple),
    sizes=st.sampled_from([(1, 1), (8, 1), (1, 8), (4, 2), (2, 4)]),
    min_size=st.integers(1, 2000),
)
def test_automatic_axes_divide_and_are_used_once(shape, sizes, min_size):
    fsdp, tensor = sizes
    spec = layout(fsdp=fsdp, tensor=tensor, min_size=min_size).spec("any", shape)
    used = [axis for axis in spec if axis is not None]
    assert len(set(used)) == len(used)
    for size, axis in zip(shape, spec, strict=False):
        assert axis is None or not size % {"fsdp": fsdp, "tensor": tensor}[axis]
    if math.prod(shape) < min_size:
        assert spec == PartitionSpec()
    elif fsdp > 1 and tensor == 1:
        assert ("fsdp" in spec) == any(size % fsdp == 0 for size in shape)


def test_largest_axis_is_split_over_fsdp_and_the_last_over_tensor():
    assert layout(fsdp=8).spec("k", (64, 128)) == PartitionSpec(None, "fsdp")
    assert layout(fsdp=8).spec("k", (3, 3, 64, 30)) == PartitionSpec(None, None, "fsdp")
    assert layout(fsdp=4, tensor=2).spec("k", (64, 128)) == PartitionSpec("fsdp", "tensor")
    assert layout(tensor=8).spec("k", (8192,)) == PartitionSpec()


def test_first_rule_that_matches_decides_and_ends_of_paths_match():
    rules = {"Dense_1/kernel": (), "*/kernel": ("tensor", "fsdp"), "bias": ("fsdp",)}
    place = layout(fsdp=4, tensor=2, rules=rules)
    assert place.spec("params/Dense_0/kernel", (64, 64)) == PartitionSpec("tensor", "fsdp")
    assert place.spec("opt_state/0/mu/Dense_0/kernel", (64, 64)) == PartitionSpec("tensor", "fsdp")
    assert place.spec("params/Dense_1/kernel", (64, 64)) == PartitionSpec()
    assert place.spec("params/Dense_1/bias", (64,)) == PartitionSpec("fsdp")
    # A factor of an optimizer has the path of its parameter, and another shape.
    assert place.spec("opt_state/0/v_row/Dense_0/kernel", (65,)) == PartitionSpec()


def test_axes_of_one_device_are_left_out():
    # Results of a program have no such axes: a state with them would compile it twice.
    place = layout(fsdp=8, rules=[("kernel", ["tensor", ["data", "fsdp"], None])])
    assert place.spec("kernel", (8, 8, 8)) == PartitionSpec(None, "fsdp")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"fsdp": -1}, "Only one axis of a MeshConfig can be -1, but data and fsdp are"),
        ({"data": 0}, "data of a MeshConfig must be an integer, at least 1; got 0"),
        ({"min_size": 0}, "min_size of a MeshConfig must be an integer, at least 1"),
        ({"max_replicated": 2}, "a share from 0 to 1; got 2"),
        ({"rules": "*/kernel"}, "must be pairs of a pattern and mesh axes"),
        ({"rules": ["*/kernel"]}, "must be a pair of a pattern and mesh axes"),
        ({"rules": {"*/kernel": ("model",)}}, "names 'model', which is not an axis"),
        ({"rules": {"*/kernel": ("fsdp", ("tensor", "fsdp"))}}, "uses a mesh axis twice"),
    ],
)
def test_wrong_configs_are_errors(options, text):
    with pytest.raises(ConfigError, match=text):
        MeshConfig(**options)


@pytest.mark.parametrize("sizes", [{"fsdp": 16}, {"fsdp": 3}, {"data": 9}])
def test_mesh_that_does_not_fit_is_an_error(sizes):
    with pytest.raises(ConfigError, match="does not fit 8 cpu devices"):
        MeshConfig(**sizes).mesh()


def test_rules_are_checked_against_the_parameters():
    params = {"Dense_0": {"kernel": jnp.zeros((30, 64)), "bias": jnp.zeros(64)}}
    with pytest.raises(ConfigError, match=r"'\*/scale' of MeshConfig.rules matches no"):
        layout(fsdp=8, rules={"*/scale": ()}).check(params)
    with pytest.raises(ConfigError, match=r"Dense_0/kernel' of shape \(30, 64\): 30 does not div"):
        layout(fsdp=8, rules={"kernel": ("fsdp",)}).check(params)
    with pytest.raises(ConfigError, match=r"Dense_0/bias' of shape \(64,\): .* for 2 axes"):
        layout(fsdp=8, rules={"Dense_0/*": (None, "fsdp")}).check(params)
    layout(fsdp=8, rules={"kernel": (None, "fsdp")}).check(params)


def test_large_parameters_that_stay_whole_are_named():
    params = {"small": jnp.zeros((64, 64)), "odd": jnp.zeros((515, 513))}
    place = layout(fsdp=8)
    with pytest.raises(ConfigError, match=r"98% of the parameters' bytes.*odd' \(515, 513\)"):
        place.check(params)
    place.check({"small": jnp.zeros((65, 65))})  # less than 1 MiB
    layout(fsdp=8, max_replicated=1.0).check(params)
    layout(tensor=8).check(params)


def test_wrong_values_of_the_option_are_errors():
    with pytest.raises(ConfigError, match=r"mesh must be one of 'dp', 'fsdp', .*; got 'ddp'"):
        tasks.Classifier(zoo.MLP((2,)), mesh="ddp")
    jax.devices()
    with pytest.raises(ConfigError, match="simulate_devices=9 must be set before JAX starts"):
        simulate(MeshOptions(simulate_devices=9))
    simulate(MeshOptions(simulate_devices=8))


@pytest.mark.slow
def test_devices_are_simulated_if_jax_has_not_started():
    program = (
        "import os, distaff, jax\n"
        "from distaff import tasks, zoo\n"
        "tasks.Classifier(zoo.MLP((2,)), mesh='fsdp', simulate_devices=4)\n"
        "print(jax.device_count(), os.environ['NPROC'])\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "NPROC"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.stdout == "4 8\n", done.stderr


def test_identity_of_a_run_does_not_depend_on_its_mesh():
    tree = {"w": jnp.ones(4)}
    places = [OnMesh(MeshConfig(size)).state for size in (1, 2)]

    def loss(tree):
        return jnp.where(tree["w"] > 0, tree["w"], 0.0).sum()

    digests = [
        program_digest(jax.grad(loss), *unplaced((each,))).whole
        for each in (tree, *(place(tree) for place in places))
    ]
    assert len(set(digests)) == 1


def test_size_of_a_mesh_does_not_make_another_run():
    configs = [TrainerConfig(mesh=MeshConfig(1, fsdp=size)) for size in (2, 4)]
    old, new = ({"options": to_json(config)} for config in configs)
    found = compare_records(old, new, None, inexact=False, options=TrainerConfig)
    assert found.changes == []
    assert found.notes[0] == "changed: options.mesh.fsdp: 2 -> 4"

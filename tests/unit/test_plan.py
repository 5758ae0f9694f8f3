"""`distaff plan`: what a step needs, read from its compiled program, against counts by hand."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import distaff
from distaff import MeshConfig, cli, tasks, zoo
from distaff.errors import ConfigError, DistaffError, MissingExtraError
from distaff.execution import compilers
from distaff.plan import GrownPlan, StepBounds, TrainingPlan, plan_recipe, plan_training
from distaff.plan.growth import first_to_grow
from distaff.plan.program.collectives import (
    Collective,
    axes_of_group,
    collectives,
    group_of,
    source_of,
)
from distaff.plan.program.hlo import CompiledProgram
from distaff.plan.program.memory_traffic import memory_traffic
from distaff.plan.program.operations import operations
from distaff.plan.roofline import exchange_rate, step_bounds
from distaff.plan.targets import target_of

BATCH = 16
WIDTHS = (64, 512, 1000, 8)
KERNELS = [first * second for first, second in itertools.pairwise(WIDTHS)]
WHOLE = KERNELS[1] + sum(WIDTHS[1:])  # one kernel by a rule, and the biases, which are small
MESH = MeshConfig(1, fsdp=-1, rules=(("Dense_1/kernel", ()),), max_replicated=1.0)
SHAPES = {
    "image": jax.ShapeDtypeStruct((BATCH, WIDTHS[0]), np.float32),
    "label": jax.ShapeDtypeStruct((BATCH,), np.int32),
}


def classifier(**options: Any) -> tasks.Classifier:
    return tasks.Classifier(
        zoo.MLP(WIDTHS[1:]),
        optimizer=distaff.OptimizerConfig("adamw", learning_rate=1e-3, warmup_steps=5),
        **{"enable_progress_bar": False, "root": None, **options},
    )


@pytest.fixture(scope="module")
def plan() -> TrainingPlan:
    trainer = classifier()
    made = plan_training(trainer, SHAPES, target="cpu:8", mesh=MESH, memory=2**30)
    assert trainer.state is None
    return made


def test_state_counts_each_array_by_the_part_that_a_device_holds(plan: TrainingPlan) -> None:
    values = WHOLE + (KERNELS[0] + KERNELS[2]) // 8
    assert plan.parameter_bytes == 4 * values
    assert plan.num_parameters == sum(KERNELS) + sum(WIDTHS[1:])
    rest = plan.state_bytes - 3 * 4 * values  # with both moments of Adam
    assert 0 < rest < 100  # steps, counters, the key
    first = plan.parameters[0]
    assert (first.path, first.shape, first.spec) == ("Dense_1/kernel", (512, 1000), "")
    assert {each.path: each.spec for each in plan.parameters}["Dense_0/kernel"] == "(None, 'fsdp')"


def test_peak_is_arguments_and_temporary_arrays(plan: TrainingPlan) -> None:
    batch = 4 * BATCH // 8 * (WIDTHS[0] + 1)
    assert plan.peak_bytes is not None
    assert plan.temporary_bytes is not None
    kept = plan.peak_bytes - plan.temporary_bytes
    assert plan.state_bytes + batch <= kept < plan.state_bytes + batch + 500  # and the metrics
    assert plan.fits
    assert plan.is_upper_bound
    assert "too high: the program for CPUs" in str(plan)


def test_exchanges_are_gathers_of_split_parameters_and_sums_of_gradients(
    plan: TrainingPlan,
) -> None:
    gathered = plan.traffic["all-gather over fsdp"]
    # Each in the forward pass; the last one also in the backward pass, unless XLA keeps it.
    assert 4 * (KERNELS[0] + KERNELS[2]) <= gathered <= 4 * (KERNELS[0] + 2 * KERNELS[2])
    gradients = sum(KERNELS) + sum(WIDTHS[1:])
    assert 4 * gradients <= plan.traffic["all-reduce over fsdp"] <= 4 * gradients + 200
    sources = " ".join(each.source for each in plan.collectives)
    assert "MLP/Dense_0/dot_general" in sources


def test_flops_are_those_of_forward_and_backward_products(plan: TrainingPlan) -> None:
    products = 3 * sum(KERNELS) - KERNELS[0]  # no gradient of the inputs
    assert plan.flops["float32"] * 8 == 2 * BATCH * products
    assert plan.times is None  # the rates of this machine are not published
    assert plan.memory_traffic > 4 * plan.num_parameters


def test_parameter_that_stays_whole_is_named_with_a_rule(plan: TrainingPlan) -> None:
    (warning,) = [each for each in plan.warnings if "Dense_1/kernel" in each]
    assert "1.95 MiB" in warning
    assert "MeshConfig(rules=(('Dense_1/kernel', (None, 'fsdp')),))" in warning


def test_plan_is_the_same_from_json(plan: TrainingPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert {"version", "peak_bytes", "state_bytes", "fits", "traffic", "flops", "warnings"} <= set(
        data
    )
    assert TrainingPlan.from_json(data) == plan


def test_tables_say_what_is_needed_and_whether_it_fits(plan: TrainingPlan) -> None:
    text = str(plan)
    for part in ("fsdp=8", "upper bound", "Dense_1/kernel", "all-gather over fsdp", "fits"):
        assert part in text
    assert "warning: " in text


LOOP = """HloModule jit_step, is_scheduled=true

FileNames
1 "/home/me/model.py"
2 "<frozen runpy>"

FileLocations
1 {file_name_id=1 function_name_id=1 line=31 end_line=31 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=88 end_line=88 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%fused (p0: f32[3,16,128], p1: s32[]) -> f32[16,128] {
  %p0 = f32[3,16,128]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[16,128]{1,0} dynamic-slice(%p0, %p1, %zero, %zero),\
 dynamic_slice_sizes={1,16,128}
}

%body (carry: (s32[], f32[3,16,128])) -> (s32[], f32[3,16,128]) {
  %carry = (s32[], f32[3,16,128]{2,1,0}) parameter(0)
  %n = s32[] get-tuple-element(%carry), index=0
  %all = f32[3,16,128]{2,1,0} get-tuple-element(%carry), index=1
  %one = f32[16,128]{1,0} fusion(%all, %n), kind=kLoop, calls=%fused
  %start = ((f32[16,128]{1,0}, bf16[2]{0}), (f32[128,128]{1,0}, /*index=1*/bf16[16]{0}))\
 all-gather-start(%one, /*index=1*/%n), channel_id=1,\
 replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0},\
 metadata={op_name="jit(step)/jvp(distaff.loss)/GPT/while/body/closed_call/up/dot_general"\
 stack_frame_id=2}
  %done = (f32[128,128]{1,0}, /*index=1*/bf16[16]{0}) all-gather-done(%start)
  ROOT %next = (s32[], f32[3,16,128]{2,1,0}) tuple(%n, %all)
}

%condition (carry: (s32[], f32[3,16,128])) -> pred[] {
  %carry = (s32[], f32[3,16,128]{2,1,0}) parameter(0)
  %n = s32[] get-tuple-element(%carry), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%n, %three), direction=LT
}

ENTRY %main (x: (s32[], f32[3,16,128])) -> f32[4,5] {
  %x = (s32[], f32[3,16,128]{2,1,0}) parameter(0)
  %loop = (s32[], f32[3,16,128]{2,1,0}) while(%x), condition=%condition, body=%body,\
 backend_config={"known_trip_count":{"n":"3"}}
  %g = f32[4,5]{1,0} constant({...})
  %reduced = (f32[4,5]{1,0}, /*index=1*/f32[]) all-reduce(%g, %s),\
 replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%sum
  %part = f32[2,5]{1,0} reduce-scatter(%g), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0},\
 to_apply=%sum
  %alone = f32[4,5]{1,0} all-reduce(%g), replica_groups=[8,1]<=[8], to_apply=%sum
  ROOT %moved = f32[4,5]{1,0} collective-permute(%g), source_target_pairs={{0,1},{1,0}}
}
"""


def test_loops_tuples_and_async_starts_are_counted() -> None:
    found = {
        each.kind: each for each in collectives(CompiledProgram(LOOP), {"fsdp": 4, "tensor": 2}, 4)
    }
    gather = found["all-gather"]
    assert (gather.count, gather.num_bytes) == (3, 3 * (128 * 128 * 4 + 16 * 2))
    assert gather.axes == ("fsdp", "tensor")
    assert gather.num_hosts == 2  # of four devices each
    assert (gather.source, gather.line) == ("GPT/up/dot_general", "/home/me/model.py:31")
    assert found["all-reduce"].num_bytes == 4 * 21
    assert found["all-reduce"].axes == ("tensor",)
    scattered = found["reduce-scatter"]
    assert (scattered.axes, scattered.num_devices) == (("fsdp",), 4)
    assert scattered.num_bytes == 4 * 4 * 10  # of what is summed
    assert scattered.sent_bytes == scattered.num_bytes * 3 / 4
    assert found["collective-permute"].num_bytes == 80
    assert len(found) == 4


def test_times_are_bytes_and_operations_over_published_rates() -> None:
    found = collectives(CompiledProgram(LOOP), {"fsdp": 4, "tensor": 2}, 4)
    flops = {"bfloat16": 989e9, "float32": 494e9, "other": 1e15}
    times = step_bounds(target_of("h100:2x4").chip, flops, 3.35e9, found)
    assert times is not None
    assert times.compute == pytest.approx(2e-3)
    assert times.memory == pytest.approx(1e-3)
    # Four network cards of a host share a gather; the pair of `tensor` and one device of each pair
    # of `fsdp` are in one host, and the four of `fsdp` in two.
    gather = 3 * (128 * 128 * 4 + 16 * 2) * 7 / 8 / (4 * 50e9)
    tensor = (4 * 21 * 2 / 2 + 80) / 450e9
    scattered = 4 * 4 * 10 * 3 / 4 / (2 * 50e9)
    assert times.network_by_axis == pytest.approx(
        {"fsdp+tensor": gather, "tensor": tensor, "fsdp": scattered}
    )
    assert times.network == pytest.approx(gather + tensor + scattered)
    assert (times.bound, times.step) == ("compute", times.compute)
    assert StepBounds.from_json(times.to_json()) == times
    assert step_bounds(target_of("cpu:8").chip, flops, 1e9, found) is None


@pytest.mark.parametrize(
    ("kind", "num_devices", "num_hosts", "rate"),
    [
        ("all-gather", 8, 1, 450e9),
        ("all-gather", 256, 32, 400e9),  # eight cards of 50 GB/s
        ("all-gather", 32, 32, 50e9),
        ("reduce-scatter", 64, 4, 450e9),  # the links are the limit
        ("all-to-all", 256, 32, 50e9),
    ],
)
def test_cards_of_a_host_add_up(kind: str, num_devices: int, num_hosts: int, rate: float) -> None:
    each = Collective(kind, ("fsdp",), num_devices, num_hosts, 1, 100, "", "", "")
    assert exchange_rate(target_of("h100").chip, each) == rate


@pytest.mark.parametrize(
    ("target", "doubled"),
    [
        ("cpu:3", "cpu:6"),
        ("h100", "h100:1x2"),
        ("H100:8", "h100:2x8"),
        ("a100:3x6", "a100:6x6"),
        ("v5e:4x4", "v5e:4x8"),
        ("v5e:4x8", "v5e:8x8"),
        ("v5p:4x4x8", "v5p:4x8x8"),
    ],
)
def test_twice_the_devices(target: str, doubled: str) -> None:
    assert target_of(target).doubled == target_of(doubled)


def grown(axis: str, **changes: Any) -> GrownPlan:
    fields = {"num_devices": 8, "num_examples": 16, "peak_bytes": 2**20, "fits": True}
    return GrownPlan(axis=axis, size=2, target="h100:8", **{**fields, **changes})


def in_time(seconds: float) -> dict[str, Any]:
    return {"times": StepBounds(compute=seconds, memory=0, network=0)}


def test_axis_to_grow_first_has_the_most_examples_per_second_of_those_that_fit() -> None:
    slow, quick = grown("data", **in_time(0.2)), grown("fsdp", **in_time(0.1))
    assert quick.examples_per_second == pytest.approx(20)
    assert first_to_grow([slow, quick]) == quick
    assert first_to_grow([slow, dataclasses.replace(quick, fits=False)]) == slow
    assert first_to_grow([slow, dataclasses.replace(quick, failure="no such devices")]) == slow
    assert first_to_grow([dataclasses.replace(slow, fits=False)]) is None
    smaller = dataclasses.replace(quick, axis="tensor", peak_bytes=2**19)
    assert first_to_grow([slow, quick, smaller]) == smaller
    # Without rates, the fewest bytes for each example.
    assert first_to_grow([grown("data", exchanged_bytes=9), grown("fsdp", exchanged_bytes=8)]) == (
        grown("fsdp", exchanged_bytes=8)
    )


@pytest.mark.slow
def test_doubled_axes_are_those_planned_by_themselves() -> None:
    made = plan_training(classifier(), SHAPES, target="cpu:4", mesh="fsdp", double=True)
    sizes = {"data": (2, 4, 1), "fsdp": (1, 8, 1), "tensor": (1, 4, 2)}
    assert [each.axis for each in made.doubled] == list(sizes)
    for each in made.doubled:
        data, fsdp, tensor = sizes[each.axis]
        alone = plan_training(
            classifier(),
            SHAPES,
            target="cpu:8",
            mesh=MeshConfig(data, fsdp=fsdp, tensor=tensor),
            batch_size=BATCH if each.axis == "tensor" else 2 * BATCH,
        )
        assert each == alone.brief(each.axis)
    text = str(made)
    for part in ("as planned", "data=2", "fsdp=8", "tensor=2", "axis to grow first: "):
        assert part in text
    assert TrainingPlan.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.slow
def test_axis_that_cannot_be_doubled_says_why() -> None:
    made = plan_training(classifier(), SHAPES, target="cpu:8", mesh="fsdp", double=True)
    assert "started with 8" in made.doubled[0].failure
    assert made.first_to_grow is None
    assert "none of them fits" in str(made)


def test_fusion_reads_the_slice_of_a_loop_and_not_the_whole_array() -> None:
    program = CompiledProgram(LOOP)
    in_body = 3 * (2 * 16 * 128 * 4 + 4)  # the slice, read and written, and its index
    assert memory_traffic(program) == in_body + 3 * (4 + 4 + 1)  # and the comparison
    assert program.unknown_loops == 0
    unknown = CompiledProgram(LOOP.replace("known_trip_count", "other"))
    assert sum(each.times for each in unknown.occurrences if each.instruction.name == "one") == 1
    assert unknown.unknown_loops == 1


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, x={}", (0, 2)),
        ("replica_groups={}", tuple(range(8))),
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}", (0, 2, 4, 6)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", (0, 1)),
        (
            "replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}",
            (0, 2, 4, 6),
        ),
    ],
)
def test_groups_of_devices(attributes: str, group: tuple[int, ...]) -> None:
    assert group_of(attributes, 8) == group


def test_axes_and_sources_of_an_exchange() -> None:
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    assert axes_of_group((0, 1), mesh) == ("tensor",)
    assert axes_of_group((0, 2, 4, 6), mesh) == ("data", "fsdp")
    assert axes_of_group((0, 9), mesh) == ()
    name = "jit(step)/transpose(jvp(distaff.loss))/GPT/while/body/closed_call/up/dot_general"
    assert source_of(name) == "GPT/up/dot_general (backward)"
    assert source_of("") == "another operation"


def test_operations_count_loops_branches_and_convolutions() -> None:
    def function(x, kernel):
        def body(carry, _):
            return jax.lax.cond(carry[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, carry), None

        looped, _ = jax.lax.scan(body, x, None, length=5)
        half = x.astype(jax.numpy.bfloat16)
        image = jax.lax.conv(x[None, None], kernel, (1, 1), "SAME")
        return looped, half @ half, image

    jaxpr = jax.make_jaxpr(function)(np.ones((8, 8), np.float32), np.ones((4, 1, 3, 3), np.float32))
    found = operations(jaxpr)
    assert found["bfloat16"] == 2 * 8**3
    assert found["float32"] == 5 * 2 * 2 * 8**3 + 2 * (4 * 8 * 8) * 9


def test_targets_by_name() -> None:
    assert target_of("h100:32x8").num_devices == 256
    assert target_of("H200").shape == (1, 1)
    assert target_of("a100:16").shape == (2, 8)
    assert target_of("v5p:4x4x8").num_devices == 128


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("h300:8", "names no known device.*h100"),
        ("v5e:16", "no valid number"),
        ("v5e", "no valid number"),
        ("cpu:4x2", "no valid number"),
        ("cpu:0", "no valid number"),
        ("h100:12", "multiple of 8"),
        ("cpu:9", "started with 8.*distaff plan"),
    ],
)
def test_unknown_targets_are_errors(target: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_training(classifier(), SHAPES, target=target, mesh="fsdp")


def test_mesh_or_batch_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(ConfigError, match="does not fit 8"):
        plan_training(classifier(), SHAPES, target="cpu:8", mesh=MeshConfig(1, fsdp=3, tensor=4))
    with pytest.raises(ConfigError, match="batch of 12 examples does not divide"):
        plan_training(classifier(), SHAPES, target="cpu:8", mesh="dp", batch_size=12)
    with pytest.raises(ConfigError, match="'fsdp=8,model=2' is not a list of sizes"):
        plan_recipe("digits", target="cpu:8", mesh="fsdp=8,model=2")


@pytest.mark.parametrize(("target", "extra"), [("h100:8", "plan-gpu"), ("v5e:4x4", "plan-tpu")])
def test_missing_compiler_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, target: str, extra: str
) -> None:
    for name in ("jax_plugins.xla_cuda12", "libtpu"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=rf'pip install "distaff\[{extra}\]"'):
        plan_training(classifier(), SHAPES, target=target, mesh="fsdp")


CUDA = "jax_plugins.xla_cuda12"


@pytest.mark.parametrize(
    ("plugins", "installed", "tpu", "expected"),
    [
        (set(), set(), False, False),
        ({CUDA}, set(), False, False),
        ({CUDA}, {"jax_cuda12_plugin"}, False, True),
        (set(), {"libtpu"}, False, False),
        (set(), {"libtpu"}, True, True),
        ({CUDA, "jax_plugins.other"}, set(), False, True),
    ],
)
def test_compilers_without_a_device_are_no_accelerators(
    monkeypatch: pytest.MonkeyPatch,
    plugins: set[str],
    installed: set[str],
    tpu: bool,
    expected: bool,
) -> None:
    monkeypatch.setattr(compilers, "_plugins", lambda: plugins)
    monkeypatch.setattr(compilers, "_is_installed", lambda name: name in installed)
    monkeypatch.setattr(compilers, "has_tpu", lambda: tpu)
    assert compilers.may_use_accelerator() == expected


def test_plugin_without_a_device_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "jax_plugins.xla_cuda99"
    monkeypatch.setattr(compilers, "_plugins", lambda: {name})
    try:
        compilers.ignore_idle()
        assert sys.modules[name].initialize() is None
    finally:
        sys.modules.pop(name, None)


def test_command_without_a_target_or_with_a_wrong_size(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["plan", "digits"]) == 2
    assert "needs --target" in capsys.readouterr().err
    assert cli.main(["plan", "digits", "--target", "cpu:2", "--memory", "much"]) == 2
    assert "--memory must be a size" in capsys.readouterr().err
    assert cli.main(["plan", "--help"]) == 0
    assert "--target TARGET" in capsys.readouterr().out


RECIPE = """
import numpy as np
from distaff import tasks, zoo

BATCH = np.ones((4, 3)), np.zeros(4, int)

def main(width: int = 8):
    trainer = tasks.Classifier(zoo.MLP((width, 4)), example_batch=BATCH)
    assert trainer.state is None
    print("before")
    trainer.train_model((np.ones((32, 3)), np.zeros(32, int)), num_epochs=2)
    print("never")

def nothing():
    pass

def wrong():
    raise KeyError("no such table")
"""


@pytest.mark.slow
def test_command_plans_a_recipe_and_trains_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    Path("recipe.py").write_text(RECIPE)
    words = ["recipe.py:main", "--width", "16", "--target", "cpu:2", "--mesh", "fsdp"]
    options = ["--global-batch=8", "--memory", "1 KiB", "--double", "--out", "p.json"]
    assert cli.main(["plan", *words, *options]) == 0
    out, err = capfd.readouterr()
    assert "does not fit" in out
    assert "before" not in out
    assert "before" in err
    assert "never" not in err
    plan = TrainingPlan.from_json(json.loads(Path("p.json").read_text()))
    assert plan.num_parameters == 3 * 16 + 16 + 16 * 4 + 4
    assert plan.batch.startswith("0 float32[8, 3]")
    assert [(each.axis, each.num_examples) for each in plan.doubled] == [
        *(("data", 16), ("fsdp", 16), ("tensor", 8))
    ]
    assert plan.first_to_grow is None  # none of them fits 1 KiB
    assert not Path("runs").exists()
    with pytest.raises(ConfigError, match="without calling train_model"):
        plan_recipe("recipe.py:nothing", target="cpu:1")
    with pytest.raises(DistaffError, match="raised KeyError: 'no such table'"):
        plan_recipe("recipe.py:wrong", target="cpu:1")


@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    [
        pytest.param("h100:2x4", marks=pytest.mark.compiler("jax_plugins.xla_cuda12")),
        pytest.param("v5e:2x4", marks=pytest.mark.compiler("libtpu")),
    ],
)
def test_real_compilers_agree_with_the_counts_by_hand(target: str) -> None:
    made = plan_training(classifier(), SHAPES, target=target, mesh=MESH)
    assert made.num_devices == 8
    assert made.parameter_bytes == 4 * (WHOLE + (KERNELS[0] + KERNELS[2]) // 8)
    assert made.fits
    assert made.times is not None
    assert made.times.step > 0
    assert made.traffic["all-gather over fsdp"] >= 4 * (KERNELS[0] + KERNELS[2])
    assert made.peak_bytes is not None
    assert made.state_bytes < made.peak_bytes


@pytest.mark.slow
@pytest.mark.compiler("jax_plugins.xla_cuda12", "libtpu")
def test_compilers_of_gpus_and_tpus_agree_on_the_memory_of_a_gpt() -> None:
    model = zoo.GPT(32_768, 16, 16, 2048, 2048, scan_layers=True)  # as in decision 59
    trainer = tasks.LanguageModel(
        model, root=None, precision="bf16", remat="blocks", enable_progress_bar=False
    )
    tokens = jax.ShapeDtypeStruct((16, 2049), np.int32)
    gpu, tpu = (
        plan_training(trainer, tokens, target=target, mesh="fsdp").peak_bytes
        for target in ("h100:2x8", "v5e:4x4")
    )
    assert gpu is not None
    assert tpu == pytest.approx(gpu, rel=0.1)


@pytest.mark.slow
@pytest.mark.compiler("jax_plugins.xla_cuda12")
def test_gpus_are_planned_for_meshes_larger_than_this_machine() -> None:
    made = plan_training(
        classifier(), SHAPES, target="h100:2x8", mesh=MeshConfig(1, fsdp=8, tensor=2), double=True
    )
    assert {each.axis: each.failure for each in made.doubled} == {
        "data": "",
        "fsdp": "",
        "tensor": "",
    }
    assert all(each.examples_per_second for each in made.doubled)
    assert "examples/s of a device" in str(made)


PRINTED = """
import numpy as np
from distaff import tasks, zoo
from distaff.execution import allocator
trainer = tasks.Classifier(zoo.MLP((4, 2)), root=None, enable_progress_bar=False)
trainer.train_model((np.ones((8, 3), np.float32), np.arange(8) % 2), num_epochs=1)
print(allocator.on_cpu_alone())
"""


@pytest.mark.slow
@pytest.mark.compiler("jax_plugins.xla_cuda12", "libtpu")
def test_installed_compilers_leave_training_on_the_cpu_as_it_is() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    command = [sys.executable, "-c", PRINTED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("True\n", "")

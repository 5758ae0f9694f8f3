from __future__ import annotations

import json
import math
import time
import warnings
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff import Monitor, OptimizerConfig, TrainerModule, data
from distaff.errors import ConfigError, MetricError
from distaff.tune.compare import compare
from distaff.tune.comparison import Comparison, Estimate, OptimizerResult, OptimizerRun

# The loss is CURVATURE / 2 * (w - TARGET) ** 2: a step of rate r multiplies w - TARGET by 1 - 4 r.
CURVATURE, TARGET = 4.0, 3.0
TOO_LARGE = 1e5


class Point(nn.Module):
    """One number, which starts where the seed says."""

    @nn.compact
    def __call__(self, x):
        return self.param("w", nn.initializers.normal(), ()) + jnp.zeros_like(x)


class Parabola(TrainerModule):
    def loss_fn(self, params, batch, ctx):
        distance = ctx.apply(params, batch["x"]) - TARGET - batch["x"]
        return CURVATURE / 2 * jnp.square(distance), {"gap": jnp.abs(distance)}


class Counted(data.ArrayLoader):
    """Counts its passes, and can take its time for each."""

    pause = 0.0

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.counted = []  # shared by copies, such as the one that an evaluation reads

    @property
    def passes(self):
        return len(self.counted)

    def __iter__(self):
        self.counted.append(None)
        time.sleep(self.pause)
        yield from super().__iter__()


class Lab:
    """Makes trainers and loaders, and keeps them."""

    def __init__(self, noise=0.0, batch_size=8, root=None, pause=0.0):
        self.trainers, self.loaders = [], []
        self.noise, self.batch_size, self.root, self.pause = noise, batch_size, root, pause

    def make_trainer(self, optimizer, seed):
        options = {"root": self.root, "name": "parabola", "enable_progress_bar": False}
        self.trainers.append(Parabola(Point(), optimizer=optimizer, seed=seed, **options))
        return self.trainers[-1]

    def make_loaders(self, seed):
        noise = np.random.default_rng(0).normal(size=24).astype(np.float32) * self.noise
        x = {"x": noise - noise.mean()}
        train = Counted(x, self.batch_size, shuffle=len(noise) > self.batch_size, seed=seed)
        val, test = Counted(x, 24), Counted(x, 24)
        val.pause = self.pause
        self.loaders.append((train, val, test))
        return train, val, test

    def compare(self, optimizers=None, grid=(0.25,), **options):
        options = {"seeds": [0], "num_epochs": 3, "target": 0.1, **options}
        optimizers = {"sgd": optax.sgd} if optimizers is None else optimizers
        return compare(self.make_trainer, optimizers, grid, self.make_loaders, **options)


@pytest.fixture
def full_batch():
    return Lab(batch_size=24)


@pytest.fixture
def minibatch():
    return Lab(noise=1.0)


def run_of(losses, **fields):
    values = {"seed": 0, "learning_rate": 0.1, "steps_per_epoch": 1, "metrics": {}, **fields}
    losses = np.array(losses, float)
    ones = np.ones_like(losses)
    return OptimizerRun(losses=losses, **{"cosines": ones, "seconds": ones, **values})


@pytest.mark.slow
def test_compare_chooses_the_best_rate_of_the_grid(full_batch):
    grid = {"sgd": (0.01, 0.24, TOO_LARGE), "adam": (1e-4, 0.5)}
    found = full_batch.compare({"sgd": optax.sgd, "adam": optax.adam}, grid, num_epochs=12)
    assert {name: result.learning_rate for name, result in found.results.items()} == {
        "sgd": 0.24,
        "adam": 0.5,
    }
    tried = found.results["sgd"].grid
    assert math.isnan(tried[TOO_LARGE])
    assert tried[0.24] < 1e-6 < tried[0.01]


def test_losses_and_steps_to_target_are_those_worked_out_by_hand(full_batch):
    rate, target = 0.05, 0.1
    found = full_batch.compare(grid=(rate,), num_epochs=30, target=target, seeds=[4, 5])
    for run in found.results["sgd"].runs:
        factor = (1 - CURVATURE * rate) ** 2
        expected = run.losses[0] * factor ** np.arange(30)
        np.testing.assert_allclose(run.losses, expected, rtol=1e-3)
        np.testing.assert_allclose(run.averaged("losses"), run.losses)
        steps = math.ceil(math.log(target / run.losses[0], factor)) + 1
        assert run.steps_to(target) == steps
        np.testing.assert_allclose(run.numbers(target)["seconds"], run.seconds[:steps].sum())
        np.testing.assert_allclose(run.cosines, 1, atol=1e-6)


def test_seeds_differ_in_parameters_and_in_order_and_repeat_themselves(minibatch):
    grid = (0.02,)
    first, second = minibatch.compare(grid=grid, seeds=[0, 1]).results["sgd"].runs
    assert first.losses[0] != second.losses[0]
    orders = [[batch["x"].tolist() for batch in train] for train, _, _ in minibatch.loaders[-2:]]
    assert orders[0] != orders[1]
    (again,) = minibatch.compare(grid=grid, seeds=[1]).results["sgd"].runs
    np.testing.assert_array_equal(again.losses, second.losses)


def test_optimizers_of_one_seed_start_alike(minibatch):
    found = minibatch.compare({"slow": optax.sgd, "fast": optax.adam}, (0.01,), seeds=[3])
    slow, fast = (result.runs[0] for result in found.results.values())
    assert slow.losses[0] == fast.losses[0]
    assert slow.losses[-1] != fast.losses[-1]


@pytest.mark.slow
def test_test_set_is_read_by_the_chosen_runs_alone_and_once(minibatch):
    found = minibatch.compare(grid=(0.01, 0.1), seeds=[0, 1])
    used = [loaders for loaders in minibatch.loaders if loaders[0].passes]
    assert [train.passes for train, _, _ in used] == [3] * 4
    assert [test.passes for _, _, test in used] == [0, 0, 1, 1]
    assert all(test.passes == 0 for train, _, test in minibatch.loaders if not train.passes)
    for run in found.results["sgd"].runs:
        assert {"val/loss", "val/gap", "test/loss", "test/gap"} == set(run.metrics)


@pytest.mark.slow
def test_a_rate_is_chosen_by_a_seed_that_is_not_reported(minibatch):
    found = minibatch.compare(grid=(0.01, 0.1), seeds=[3, 5], num_epochs=1)
    assert [trainer.config.seed for trainer in minibatch.trainers] == [6, 6, 3, 5]
    assert [run.seed for run in found.results["sgd"].runs] == [3, 5]


@pytest.mark.parametrize(
    ("rate", "grid", "edge"),
    [
        (0.1, {0.1: 1.0, 0.2: 2.0, 0.3: 3.0}, "lowest"),
        (0.2, {0.1: 1.0, 0.2: 0.5, 0.3: 3.0}, None),
        (0.3, {0.1: 1.0, 0.2: 0.5, 0.3: 0.1}, "highest"),
        (0.1, {}, None),
        (None, {None: 1.0}, None),
    ],
)
def test_a_rate_at_the_edge_of_its_grid_is_named(rate, grid, edge):
    result = OptimizerResult(learning_rate=rate, grid=grid, runs=(run_of([1.0]),))
    assert result.edge == edge
    table = Comparison(results={"sgd": result}, target=0.1).table()
    assert (f"at the edge of its grid: sgd ({edge})" in table) == (edge is not None)
    assert ("*" in table) == (edge is not None)


def test_a_grid_of_one_rate_costs_no_further_run(minibatch):
    found = minibatch.compare(seeds=[0, 1])
    assert len(minibatch.trainers) == 2
    assert found.results["sgd"].grid == {}


def test_an_optimizer_without_a_learning_rate_has_a_grid_of_none(full_batch):
    optimizers = {"sgd": optax.sgd, "own": lambda _: optax.sgd(0.1)}
    found = full_batch.compare(optimizers, {"sgd": [0.1], "own": (None,)})
    own, sgd = found.results["own"], found.results["sgd"]
    assert (own.learning_rate, own.shown_rate, sgd.shown_rate) == (None, "-", "0.1")
    np.testing.assert_array_equal(own.runs[0].losses, sgd.runs[0].losses)
    assert found.table().splitlines()[2].split()[:2] == ["own", "-"]


def test_curves_are_averaged_over_an_epoch_and_over_seeds(minibatch):
    found = minibatch.compare(grid=(0.02,), seeds=[0, 1, 2], num_epochs=4)
    runs = found.results["sgd"].runs
    curve = found.curves("losses")["sgd"]
    assert [run.steps_per_epoch for run in runs] == [3, 3, 3]
    np.testing.assert_array_equal(curve.steps, np.arange(1, 13))
    assert np.isnan(curve.mean[:2]).all()
    means = np.array([[run.losses[i - 2 : i + 1].mean() for i in range(2, 12)] for run in runs])
    np.testing.assert_allclose(curve.mean[2:], means.mean(axis=0))
    error = means.std(axis=0, ddof=1) / math.sqrt(3)
    np.testing.assert_allclose(curve.standard_error[2:], error)
    row = found.rows()["sgd"]
    np.testing.assert_allclose(row["final_loss"][:2], (means[:, -1].mean(), error[-1]))
    assert row["mean_loss"].mean == pytest.approx(np.mean([run.losses for run in runs]))


@pytest.mark.slow
def test_diverged_rates_and_runs_are_recorded_and_nothing_crashes(full_batch):
    optimizers = {"sgd": optax.sgd, "never": optax.sgd, "once": optax.sgd}
    grid = {"sgd": [0.1], "never": [TOO_LARGE, 2 * TOO_LARGE], "once": [TOO_LARGE]}
    found = full_batch.compare(optimizers, grid, num_epochs=10, seeds=[0, 1])
    never, once = found.results["never"], found.results["once"]
    assert math.isnan(never.learning_rate)
    assert never.runs == ()
    assert all(map(math.isnan, never.grid.values()))
    assert [run.diverged for run in once.runs] == [True, True]
    assert not any(run.diverged for run in found.results["sgd"].runs)
    assert once.runs[0].numbers(1e9)["steps"] == 1
    assert found.rows()["once"]["final_loss"] == Estimate(
        *(pytest.approx(math.nan, nan_ok=True),) * 2, 0, 2
    )
    assert set(found.curves("losses")) == {"sgd", "once"}
    lines = found.table().splitlines()
    title = "optimizer rate final loss mean loss val/gap test/gap steps to 0.1 seconds cosine"
    assert " ".join(lines[0].split()) == title
    assert lines[2].split()[:2] == ["never", "diverged"]
    assert [line.split()[0] for line in lines[1:]] == ["sgd", "never", "once"]


@pytest.mark.parametrize(
    ("losses", "steps_per_epoch", "expected"),
    [
        ([4, 2, 1, 0.5], 1, 3),
        ([4, 2, 1, 0.5], 2, 4),  # (1 + 0.5) / 2 is the first mean of two that is at most 1
        ([4, 0.1, 4, 0.1], 2, None),
        ([4, 1, math.nan, math.nan], 1, 2),
        ([math.nan, 1, 1, 1], 2, 3),
        ([4, math.inf, 0.5, 0.5], 2, 4),
        ([0.5, 0.5], 3, None),
        ([4, 3], 1, None),
        ([], 1, None),
    ],
)
def test_steps_to_target(losses, steps_per_epoch, expected):
    assert run_of(losses, steps_per_epoch=steps_per_epoch).steps_to(1.0) == expected


def test_estimates_count_the_runs_that_have_a_number():
    runs = (
        run_of([4, 2, 1], metrics={"val/loss": 3.0}),
        run_of([4, 1, 1], metrics={"val/loss": 5.0}),
        run_of([4, 3, math.nan], diverged=True),
    )
    result = OptimizerResult(learning_rate=0.1, grid={}, runs=runs)
    row = Comparison(results={"adam": result}, target=1.0).rows()["adam"]
    assert row["steps"] == Estimate(2.5, 0.5, 2, 3)
    assert row["final_loss"] == Estimate(1.0, 0.0, 2, 3)
    assert row["val/loss"] == Estimate(4.0, 1.0, 2, 3)
    assert str(row["steps"]) == "2.5 ± 0.5 (2/3)"
    curve = result.curve("losses")
    np.testing.assert_allclose(curve.mean, [4, 2, math.nan])
    np.testing.assert_allclose(curve.standard_error, [0, 1 / math.sqrt(3), math.nan])


@pytest.mark.parametrize("losses", [[], [4], [4, 3, 2]])
def test_a_run_that_diverged_has_no_loss_whenever_it_did(losses):
    numbers = run_of(losses, diverged=True, metrics={"val/loss": 1.0}).numbers(3.0)
    assert math.isnan(numbers["final_loss"])
    assert math.isnan(numbers["mean_loss"])
    assert "val/loss" not in numbers
    assert numbers["steps"] == pytest.approx(2 if len(losses) == 3 else math.nan, nan_ok=True)


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.98765, 0.00123, 5, 5), "0.9877 ± 0.0012"),
        (Estimate(1.0, 5e-9, 5, 5), "1 ± 0"),
        (Estimate(7.0, math.nan, 1, 1), "7"),
        (Estimate(math.nan, math.nan, 0, 5), "-"),
    ],
)
def test_estimate_reads_as_mean_and_error(estimate, text):
    assert str(estimate) == text


def test_seconds_leave_out_compilation_and_validation():
    found = Lab(batch_size=24, pause=0.2).compare(num_epochs=6)
    (run,) = found.results["sgd"].runs
    assert run.seconds[0] == np.median(run.seconds[1:])
    assert 0 < run.seconds.sum() < 0.6


@pytest.mark.slow
def test_runs_are_ordinary_run_directories_that_record_the_optimizer(tmp_path: Path):
    config = {"sgd": lambda rate: OptimizerConfig("sgd", learning_rate=rate)}
    found = Lab(root=str(tmp_path)).compare(config, [0.1, 0.2], seeds=[7])
    (run,) = found.results["sgd"].runs
    paths = sorted((tmp_path / "parabola").iterdir())
    assert [path.name for path in paths] == ["0001", "0002", "0003"]
    assert run.path == paths[-1]
    record = json.loads((run.path / "config.json").read_text())
    assert record["optimizer"]["optimizer"]["learning_rate"] == run.learning_rate
    assert record["options"]["seed"] == 7
    status = json.loads((run.path / "status.json").read_text())
    assert status["status"] == "finished"


@pytest.mark.slow
def test_monitor_and_direction_choose_the_rate(full_batch):
    grid = (0.01, 0.24)
    worst = full_batch.compare(grid=grid, monitor=Monitor("val/gap", mode="max"))
    best = full_batch.compare(grid=grid, monitor=Monitor("val/gap"))
    assert worst.results["sgd"].learning_rate == 0.01
    assert best.results["sgd"].learning_rate == 0.24


def test_unknown_monitor_is_refused_before_a_step(minibatch):
    with pytest.raises(MetricError, match="val/accuracy"):
        minibatch.compare(monitor=Monitor("val/accuracy"))
    assert not any(train.passes for train, _, _ in minibatch.loaders)


@pytest.mark.slow
def test_same_order_for_all_seeds_is_warned_of(minibatch):
    def same_order(seed):
        return Lab.make_loaders(minibatch, 0)

    minibatch.make_loaders = same_order
    with pytest.warns(UserWarning, match="same first batch for seeds 0 and 1"):
        minibatch.compare(seeds=[0, 1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        minibatch.compare(seeds=[0])
    assert [str(each.message) for each in caught] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizers": {}}, "optimizers must be a dict"),
        ({"grid": {"sdg": [1e-3]}}, "Did you mean 'sgd'"),
        ({"grid": {}}, r"for 'sgd' it has \[\]"),
        ({"grid": [0.1, 0.1]}, r"for 'sgd' it has \[0.1, 0.1\]"),
        ({"seeds": []}, r"got \[\]"),
        ({"seeds": [3, 3]}, r"different integers; got \[3, 3\]"),
        ({"num_epochs": 0}, "num_epochs"),
        (
            {"optimizers": {"x": lambda rate: OptimizerConfig("sgd", warmup_steps=99)}},
            "The warm-up must be shorter than the run",
        ),
        ({"optimizers": {"x": lambda rate: rate}}, "optimizer must be an OptimizerConfig"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_run(minibatch, options, message):
    with pytest.raises(ConfigError, match=message):
        minibatch.compare(**options)
    assert minibatch.trainers == []


def test_trainer_that_ignores_seed_or_optimizer_is_refused(minibatch):
    cases = {
        "called with seed 1, but its trainer has seed 42": {},
        "its trainer has another one": {"seed": 1},
    }
    for message, options in cases.items():
        minibatch.make_trainer = lambda optimizer, seed, options=options: Parabola(
            Point(), root=None, **options
        )
        with pytest.raises(ConfigError, match=message):
            minibatch.compare(seeds=[1])


def test_loaders_without_validation_or_length_are_refused(minibatch):
    train, val, test = minibatch.make_loaders(0)
    for loaders, message in [
        ((train, None, test), "val may not"),
        ((train, val), r"\(train, val, test\)"),
        ((data.Stream(lambda: iter(train)), val, test), "the train loader has no length"),
    ]:
        minibatch.make_loaders = lambda seed, loaders=loaders: loaders
        with pytest.raises(ConfigError, match=message):
            minibatch.compare()

"""Options of the loop that try out a run on little data, and several validation sets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distaff
from distaff import Callback, Monitor, OptimizerConfig, data
from distaff.data import Limited
from distaff.data.wrappers.limited import most_batches
from distaff.errors import BatchError, CheckpointError, ConfigError, MetricError
from distaff.run.evaluation import Evaluator
from distaff.testing.loaders import LoaderContract, assert_batches_equal
from scripted import Break, InterruptError

ARRAYS = {
    "x": np.arange(80, dtype=np.float32).reshape(40, 2),
    "y": np.arange(40.0, dtype=np.float32),
}


class Regression(distaff.TrainerModule):
    """Notes what it validates on."""

    seen: list[Any]

    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"] / 80)[:, 0] - batch["y"] / 40)

    def on_validation_epoch_end(self, epoch, metrics, val_loader):
        self.seen = [*getattr(self, "seen", []), val_loader]


def trainer(**options: Any) -> Regression:
    options = {"root": None, "optimizer": OptimizerConfig(schedule="constant"), **options}
    return Regression(nn.Dense(1), enable_progress_bar=False, tune_process=False, **options)


def arrays(start: int = 0, **options: Any) -> data.ArrayLoader:
    rows = jax.tree.map(lambda leaf: leaf[start:], ARRAYS)
    return data.ArrayLoader(rows, 4, **options)


class TestLimitedArrays(LoaderContract):
    def make_loader(self) -> data.Loader:
        return Limited(arrays(shuffle=True, seed=4), 4)


class TestLimitedToItsLength(LoaderContract):
    def make_loader(self) -> data.Loader:
        return Limited(arrays(20), 5)


class TestLimitedToMore(LoaderContract):
    def make_loader(self) -> data.Loader:
        return Limited(arrays(20), 7)


class TestLimitedStream(LoaderContract):
    batches = tuple(arrays(20))

    def make_loader(self) -> data.Loader:
        return Limited(data.Stream(list(self.batches)), 3)


@pytest.mark.parametrize("taken", [-1, 5, None])
def test_limited_loader_refuses_the_position_of_another(taken):
    loader = Limited(arrays(), 4)
    state = {**loader.get_state(), "taken": taken} if taken else arrays().get_state()
    with pytest.raises(BatchError, match=r"limited to 4 batches; the saved position is"):
        loader.set_state(state)


class Batches:
    """A loader of one's own that notes which batches were asked for."""

    def __init__(self, length: int = 10) -> None:
        self.length, self.asked, self.closed = length, [], 0

    def __call__(self) -> Iterator[Any]:
        try:
            for number in range(self.length):
                self.asked.append(number)
                yield jax.tree.map(lambda leaf, at=4 * number: leaf[at : at + 4], ARRAYS)
        finally:
            self.closed += 1


@pytest.mark.parametrize("make", [arrays, Batches])
@pytest.mark.slow
def test_limit_batches_limits_every_loader(make):
    run = trainer(limit_batches=3)
    result = run.train_model(make(), make(), make(), num_epochs=2)
    assert result.step == 6
    first = data.ArrayLoader(jax.tree.map(lambda leaf: leaf[:12], ARRAYS), 4)
    expected = run.eval_model(first)["loss"]
    assert result.metrics["test/loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_limit_batches_goes_on_in_the_next_epoch_and_no_further_than_the_loader():
    class Order(Callback):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def on_epoch_end(self, info):
            self.steps.append(info.step)

    order = Order()
    trainer(limit_batches=4, callbacks=[order]).train_model(arrays(), num_epochs=3)
    assert order.steps == [4, 8, 12]
    order = Order()
    trainer(limit_batches=40, callbacks=[order]).train_model(arrays(), num_epochs=2)
    assert order.steps == [10, 20]
    order = Order()
    run = trainer(limit_batches=2, callbacks=[order])
    run.train_model(arrays(), num_epochs=2, steps_per_epoch=7)
    assert order.steps == [2, 4]


@pytest.mark.slow
def test_overfit_batches_trains_and_validates_on_the_same_few():
    loader = arrays(shuffle=True, seed=1)
    few = jax.tree.map(
        lambda *leaves: np.concatenate(leaves), *islice(arrays(shuffle=True, seed=1), 2)
    )
    run = trainer(overfit_batches=2, optimizer=FAST)
    result = run.train_model(loader, arrays(), num_epochs=100)
    assert result.step == 200
    assert result.metrics["val/loss"] < 1e-3
    assert run.eval_model(data.ArrayLoader(few, 4))["loss"] == pytest.approx(
        result.metrics["val/loss"], rel=1e-4
    )
    assert loader.get_state()["batch"] == 0  # it stands where it stood


def test_fast_dev_run_takes_one_batch_of_everything_and_writes_nothing(tmp_path):
    train, val, test = Batches(), Batches(), Batches()
    run = trainer(fast_dev_run=True, root="runs")
    result = run.train_model(train, val, test, num_epochs=7, steps_per_epoch=5)
    assert (result.step, result.epoch, result.path) == (1, 1, None)
    assert {"val/loss", "test/loss"} <= set(result.metrics)
    assert set(train.asked + val.asked + test.asked) <= {0, 1}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("overfit_batches", value) for value in (0, -1, 0.5, "3")),
        *(("limit_batches", value) for value in (0, -1, 0.0, 1.5, -0.5, True, "3", float("nan"))),
    ],
)
def test_options_that_are_no_count_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be an integer, at least 1"):
        trainer(**{name: value})


def test_limit_batches_is_a_fraction_of_each_loader():
    train, val, test = Batches(), Batches(6), arrays()
    run = trainer(limit_batches={"train": 0.29, "val": 1, "test": 0.5})
    assert run.train_model(arrays(), val, test, num_epochs=2).step == 4
    assert set(val.asked) <= {0, 1}
    half = data.ArrayLoader(jax.tree.map(lambda leaf: leaf[:20], ARRAYS), 4)
    expected = run.eval_model(half)["loss"]
    tested = run.last_run.recorder.result().metrics["test/loss"]
    assert tested == pytest.approx(expected, rel=1e-6)
    assert trainer(limit_batches=0.01).train_model(arrays(), num_epochs=2).step == 2
    assert trainer(limit_batches=1.0).train_model(arrays(), num_epochs=1).step == 10
    with pytest.raises(
        ConfigError, match=r"0.5 of the train loader needs its length.*'train': 100"
    ):
        trainer(limit_batches=0.5).train_model(train, num_epochs=1)


def test_limit_batches_of_each_validation_set_and_no_other():
    limit = {"val": 2, "val_noisy": 1}
    limited_run = trainer(limit_batches=limit)
    limited_run.monitor = Monitor("val_noisy/loss")
    clean, noisy = Batches(), Batches()
    result = limited_run.train_model(arrays(), {"clean": clean, "noisy": noisy}, num_epochs=1)
    assert result.step == 10
    assert (max(clean.asked), max(noisy.asked)) == (1, 0)
    with pytest.raises(ConfigError, match=r"no loader 'val_nosy'. Did you mean 'val_noisy'"):
        trainer(limit_batches={"val_nosy": 1}).train_model(arrays(), several(), num_epochs=1)
    with pytest.raises(ConfigError, match=r"no loader 'training'. Did you mean 'train'"):
        trainer(limit_batches={"training": 1})
    with pytest.raises(ConfigError, match=r"limit_batches\['val'\] must be an integer, at least 1"):
        trainer(limit_batches={"val": 0})


@pytest.mark.parametrize("length", range(1, 40))
def test_a_fraction_is_rounded_down_whatever_its_bits(length):
    for count in range(1, length + 1):
        assert most_batches(count / length, "train", length) == count


@pytest.mark.slow
def test_mistake_in_validation_shows_before_the_first_step():
    steps: list[int] = []

    class Count(Callback):
        def on_step_end(self, info):
            steps.append(info.step)

    class Broken(Regression):
        def create_functions(self):
            train_step, eval_step = super().create_functions()

            def broken(state, batch):
                def look(x):
                    raise OSError("only when it runs")

                shape = jax.ShapeDtypeStruct((), jnp.float32)
                loss = jax.pure_callback(look, shape, batch["x"])
                return {**eval_step(state, batch), "loss": loss}

            return train_step, broken

    def run(**options: Any) -> None:
        options = {"root": None, "callbacks": [Count()], **options}
        found = Broken(nn.Dense(1), enable_progress_bar=False, tune_process=False, **options)
        found.train_model(arrays(), arrays(), num_epochs=1)

    with pytest.raises(Exception, match="only when it runs"):
        run()
    assert steps == []
    with pytest.raises(Exception, match="only when it runs"):
        run(check_validation=False)
    assert len(steps) == 10


def test_looking_at_the_validation_changes_nothing():
    def train(**options: Any) -> tuple[Any, Any, Any]:
        run = trainer(**options)
        val = data.ArrayLoader(ARRAYS, 4, shuffle=True, seed=2)
        result = run.train_model(arrays(shuffle=True), val, num_epochs=2)
        return run.state.arrays(), result.metrics, val.get_state()

    looked, plain = train(), train(check_validation=False)
    keys = jax.random.key_data(looked[0].pop("rng")), jax.random.key_data(plain[0].pop("rng"))
    np.testing.assert_array_equal(*keys)
    assert_batches_equal(*(jax.tree.map(np.asarray, each[0]["params"]) for each in (looked, plain)))
    assert looked[1:] == plain[1:]


def test_validation_is_looked_at_once_and_only_where_that_is_asked_for(monkeypatch):
    calls: list[int] = []
    original = Evaluator.__call__

    def counting(self, state, chunks):
        chunks = list(chunks)
        calls.append(sum(chunk.num_steps for chunk in chunks))
        return original(self, state, chunks)

    monkeypatch.setattr("distaff.run.evaluation.Evaluator.__call__", counting)
    trainer().train_model(arrays(), arrays(), arrays(), num_epochs=2)
    assert calls == [1, 10, 10, 10]
    calls.clear()
    trainer(check_validation=False).train_model(arrays(), arrays(), num_epochs=1)
    assert calls == [10]


def several() -> dict[str, Any]:
    return {"clean": arrays(), "noisy": Batches(3)}


def test_several_validation_sets_have_metrics_of_their_own():
    run = trainer(root="runs")
    run.monitor = Monitor("val_noisy/loss")
    sets = several()
    result = run.train_model(arrays(shuffle=True), sets, num_epochs=2)
    assert {"val_clean/loss", "val_noisy/loss"} <= set(result.metrics)
    assert "val/loss" not in result.metrics
    few = data.ArrayLoader(jax.tree.map(lambda leaf: leaf[:12], ARRAYS), 4)
    assert result.metrics["val_noisy/loss"] == pytest.approx(run.eval_model(few)["loss"], rel=1e-6)
    assert result.metrics["val_clean/loss"] == pytest.approx(
        run.eval_model(arrays())["loss"], rel=1e-6
    )
    assert result.best is not None
    assert [set(seen) for seen in run.seen] == [{"clean", "noisy"}] * 2
    assert run.seen[0]["clean"] is sets["clean"]
    written = json.loads(Path("runs/regression/0001/metrics/val_epoch_0002.json").read_text())
    assert set(written) == {"val_clean/loss", "val_noisy/loss"}


def test_one_of_several_validation_sets_is_to_be_monitored():
    class Plain(distaff.TrainerModule):
        def loss_fn(self, params, batch, ctx):
            return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])

    run = Plain(nn.Dense(1), root=None, enable_progress_bar=False, tune_process=False)
    with pytest.raises(MetricError, match=r"'val/loss' is not.*'val_clean/loss', 'val_noisy/loss'"):
        run.train_model(arrays(), several(), num_epochs=1)


@pytest.mark.parametrize("name", ["a/b", "", 3, "two words"])
def test_validation_set_with_a_bad_name_is_refused(name):
    with pytest.raises(ConfigError, match=r"A validation set's name.*letters, digits"):
        trainer().train_model(arrays(), {name: arrays()}, num_epochs=1)


def test_dict_of_arrays_is_one_validation_set():
    run = trainer()
    result = run.train_model(arrays(), ARRAYS, num_epochs=1)
    assert {name for name in result.metrics if name.startswith("val")} == {"val/loss"}


def test_error_names_the_validation_set():
    bad = {**ARRAYS, "y": ARRAYS["y"][:3]}
    with pytest.raises(BatchError, match="of a batch of the val_bad loader"):
        trainer().train_model(arrays(), {"good": arrays(), "bad": [bad]}, num_epochs=1)


FAST = OptimizerConfig("adam", learning_rate=0.05, schedule="constant")


def resumable(step: int | None, root: str, val: Any, **options: Any) -> Any:
    run = trainer(root=root, callbacks=[Break(step)], save_every=1e-9, **options)
    run.monitor = Monitor("val_clean/loss")
    run.train_model(arrays(shuffle=True), val, num_epochs=3)
    return run


def shuffled_sets() -> dict[str, Any]:
    return {"clean": arrays(shuffle=True, seed=5), "noisy": arrays(shuffle=True, seed=6)}


@pytest.mark.parametrize(
    "options", [{}, {"limit_batches": {"train": 0.4, "val": 4}}, {"overfit_batches": 3}]
)
@pytest.mark.slow
def test_run_with_several_validation_sets_goes_on_bit_for_bit(options):
    whole = resumable(None, "whole", shuffled_sets(), **options)
    with pytest.raises(InterruptError):
        resumable(whole.step - 2, "cut", shuffled_sets(), **options)
    sets = shuffled_sets()
    resumed = resumable(None, "cut", sets, **options)
    assert "from its checkpoint of step" in Path("cut/regression/0001/log.txt").read_text()
    assert_batches_equal(*(jax.tree.map(np.asarray, run.state.params) for run in (whole, resumed)))
    assert resumed.best_metrics == whole.best_metrics
    if not options:
        assert [each.get_state()["epoch"] for each in sets.values()] == [0, 0]


def test_run_does_not_go_on_with_other_validation_sets():
    with pytest.raises(InterruptError):
        resumable(13, "cut", shuffled_sets())
    clean = {"clean": arrays(shuffle=True, seed=5)}
    said = r"(?s)val_noisy data differs: removed.*val_dirty data differs: added"
    with pytest.raises(CheckpointError, match=said):
        resumable(None, "cut", {**clean, "dirty": arrays()}, resume="must")


def test_run_does_not_go_on_with_other_callbacks():
    with pytest.raises(InterruptError):
        resumable(13, "cut", shuffled_sets())
    without = trainer(root="cut", resume="must")
    without.monitor = Monitor("val_clean/loss")
    with pytest.raises(CheckpointError, match="callbacks: 1 in the checkpoint, 0 in this run"):
        without.train_model(arrays(shuffle=True), shuffled_sets(), num_epochs=3)


def test_limit_is_the_most_of_an_epoch_whose_length_is_not_known():
    def five():
        yield from islice(iter(arrays()), 5)

    assert trainer(limit_batches=10).train_model(five, num_epochs=2).step == 10
    assert trainer(limit_batches=3).train_model(five, num_epochs=2).step == 6


def test_loaders_of_the_user_are_left_open_under_a_limit():
    class Open(data.ArrayLoader):
        def close(self) -> None:
            raise AssertionError("closed")

    result = trainer(limit_batches=2).train_model(
        Open(ARRAYS, 4), Open(ARRAYS, 4), Open(ARRAYS, 4), num_epochs=1
    )
    assert result.step == 2


def test_generator_that_runs_out_is_refused_under_a_limit_too():
    with pytest.raises(BatchError, match="val"):
        trainer(limit_batches=2).train_model(arrays(), iter(list(arrays())), num_epochs=3)


def test_fast_dev_run_validates_whatever_the_rhythm():
    fast = trainer(fast_dev_run=True, check_val_every_n_epoch=2)
    assert "val/loss" in fast.train_model(arrays(), arrays(), num_epochs=4).metrics


@pytest.mark.parametrize("check_validation", [False, True])
@pytest.mark.slow
def test_validation_sets_of_other_batch_sizes_compile_once_each(check_validation: bool):
    sets = {"four": arrays(), "five": data.ArrayLoader(ARRAYS, 5)}
    strict = trainer(recompile="error", check_validation=check_validation)
    strict.monitor = Monitor("val_four/loss")
    assert strict.train_model(arrays(), sets, num_epochs=3).step == 30


@pytest.mark.slow
def test_many_validation_sets_keep_their_feeds():
    sets = {f"n{count}": data.ArrayLoader(ARRAYS, count) for count in range(2, 8)}
    many = trainer()
    many.monitor = Monitor("val_n7/loss")
    many.train_model(arrays(), sets, num_epochs=1)
    first = [many._workspace.feeds.of(loader, name="") for loader in sets.values()]
    assert [many._workspace.feeds.of(loader, name="") for loader in sets.values()] == first


@pytest.mark.slow
def test_run_goes_back_past_the_validation_of_a_limited_stream():
    x = ARRAYS["x"].copy()
    x[30] = np.nan
    back = trainer(limit_batches=10, on_bad_numbers="rollback")
    result = back.train_model(data.ArrayLoader({**ARRAYS, "x": x}, 4), list(arrays()), num_epochs=2)
    assert result.status == "finished"
    assert len(back.last_run.state.skipped) == 2

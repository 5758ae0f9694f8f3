"""The ends of a training, what comes after one, and what a run is judged by."""

from __future__ import annotations

import math
import os
import signal
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff import Callback, EarlyStopping, Monitor, OptimizerConfig, StepInfo, StopTraining, data
from distaff.errors import ConfigError, MetricError
from distaff.loggers import MemoryLogger
from distaff.metrics.monitor import direction
from distaff.optim.reuse import restart_schedules, reusable_state
from scripted import Break, InterruptError, Regression


def loader(seed: int = 0) -> data.ArrayLoader:
    x = np.random.default_rng(seed).normal(size=(32, 3)).astype(np.float32)
    return data.ArrayLoader({"x": x, "y": x.sum(axis=1)}, batch_size=4)


def make(cls: type[Any] = Regression, **options: Any) -> Any:
    defaults = {"optimizer": OptimizerConfig("sgd", learning_rate=0.01), "root": None}
    return cls(nn.Dense(1), enable_progress_bar=False, **{**defaults, **options})


class Witness(Callback):
    """Notes how the training ended, and has something happen at step 3."""

    def __init__(self, happens: Any = None) -> None:
        self.happens, self.infos = happens, list[StepInfo]()

    def on_step_end(self, info):
        if info.step == 3 and self.happens is not None:
            self.happens()

    def on_training_end(self, info):
        self.infos.append(info)


def raises(error: BaseException) -> Any:
    def happens() -> None:
        raise error

    return happens


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("happens", "status", "reason", "error"),
    [
        (None, "finished", "", None),
        (raises(StopTraining("enough")), "stopped", "enough", None),
        (raises(StopTraining("hopeless", "pruned")), "pruned", "hopeless", None),
        (press_ctrl_c, "interrupted", "Ctrl-C", None),
        (raises(InterruptError("x")), "failed", "InterruptError: x", InterruptError),
        (raises(KeyboardInterrupt()), "interrupted", "KeyboardInterrupt: ", KeyboardInterrupt),
    ],
)
@pytest.mark.slow
def test_every_end_comes_once_to_every_callback_with_its_status(happens, status, reason, error):
    witnesses = [Witness(), Witness(happens), Witness()]
    trainer = make(callbacks=witnesses)
    if error is None:
        trainer.train_model(loader(), loader(1), num_epochs=1)
    else:
        with pytest.raises(error):
            trainer.train_model(loader(), loader(1), num_epochs=1)
    for witness in witnesses:
        (info,) = witness.infos
        assert (info.status, info.reason, type(info.error)) == (status, reason, error or type(None))


def test_an_error_at_the_end_leaves_nobody_out_and_hides_no_other(caplog):
    class Broken(Callback):
        def on_training_end(self, info):
            raise OSError("disk")

    last = Witness()
    with pytest.raises(OSError, match="disk"):
        make(callbacks=[Broken(), last]).train_model(loader(), num_epochs=1)
    assert [info.status for info in last.infos] == ["finished"]
    with pytest.raises(InterruptError):
        make(callbacks=[Broken(), Break(3), last]).train_model(loader(), num_epochs=1)
    assert [info.status for info in last.infos] == ["finished", "failed"]
    assert "Broken.on_training_end also failed" in caplog.text


def test_a_callback_that_fails_at_the_start_ends_those_before_it():
    class Failing(Callback):
        def on_training_start(self, info):
            raise InterruptError

    first = Witness()
    with pytest.raises(InterruptError):
        make(callbacks=[first, Failing()]).train_model(loader(), num_epochs=1)
    assert [info.status for info in first.infos] == ["failed"]


def test_stop_within_an_epoch_has_metrics_a_validation_and_a_checkpoint():
    trainer = make(callbacks=[Witness(raises(StopTraining("enough")))])
    result = trainer.train_model(loader(), loader(1), num_epochs=5)
    assert (result.step, result.epoch, result.best.step) == (3, 1, 3)
    assert {"train/loss", "val/loss"} <= set(result.metrics)


@pytest.mark.parametrize(
    ("hook", "epoch"),
    [("on_training_start", 0), ("on_training_epoch_end", 1), ("on_validation_epoch_end", 1)],
)
def test_hooks_of_a_trainer_may_stop_it(hook, epoch):
    def stop(self: Any, *arguments: Any) -> None:
        raise StopTraining("", "pruned")

    trainer = make(type("Stopping", (Regression,), {hook: stop}))
    result = trainer.train_model(loader(), loader(1), num_epochs=3)
    assert (result.status, result.reason, result.epoch) == ("pruned", "Stopping", epoch)
    assert ("val/loss" in result.metrics) == bool(epoch)


def test_a_stopped_run_that_dies_in_its_validation_is_validated_by_the_next_start():
    class Dying(Regression):
        dies = True

        def eval_model(self, loader, prefix=""):
            if self.dies:
                os.kill(os.getpid(), signal.SIGINT)
            return super().eval_model(loader, prefix)

    options = {"root": "runs", "name": "dying", "check_validation": False}
    first = make(Dying, callbacks=[Witness(raises(StopTraining("enough")))], **options)
    assert first.train_model(loader(), loader(1), num_epochs=5).status == "interrupted"
    second = make(Dying, callbacks=[Witness()], **options)
    second.dies = False
    result = second.train_model(loader(), loader(1), num_epochs=5)
    assert (result.status, result.reason, result.step) == ("stopped", "enough", 3)
    assert result.best.step == 3


def test_a_resumed_run_that_is_stopped_at_its_start_trains_nothing():
    class Never(Callback):
        def on_training_start(self, info):
            if info.step:
                raise StopTraining("not today")

    options = {"root": "runs", "name": "never"}
    first = make(callbacks=[Never(), Witness(press_ctrl_c)], **options)
    assert first.train_model(loader(), loader(1), num_epochs=2).status == "interrupted"
    result = make(callbacks=[Never(), Witness()], **options).train_model(
        loader(), loader(1), num_epochs=2
    )
    assert (result.status, result.reason, result.step) == ("stopped", "not today", 3)


def trained(optimizer: Any, *epochs: int, **options: Any) -> tuple[Any, list[float]]:
    logger = MemoryLogger()
    trainer = make(optimizer=optimizer, loggers=[logger], log_every_n_steps=1, **options)
    for count in epochs:
        trainer.train_model(loader(), num_epochs=count)
    rates = [each.metrics.get("step/learning_rate") for each in logger.records]
    return trainer, [rate for rate in rates if rate is not None]


@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerConfig("adam", learning_rate=0.01, schedule="constant"),
        optax.adam(optax.linear_schedule(0.1, 0.0, 40)),
    ],
    ids=["config", "transformation"],
)
@pytest.mark.slow
def test_two_calls_are_as_one(optimizer):
    once, twice = trained(optimizer, 4)[0], trained(optimizer, 1, 3)[0]
    assert jax.tree.all(jax.tree.map(np.array_equal, once.state.params, twice.state.params))
    fresh = trained(optimizer, 1, 3, keep_optimizer=False)[0]
    assert not np.array_equal(once.state.params["kernel"], fresh.state.params["kernel"])


def test_schedule_of_a_config_begins_again_and_moments_do_not():
    config = OptimizerConfig("adamw", learning_rate=0.1, schedule="cosine")
    trainer, rates = trained(config, 1, 2)
    np.testing.assert_allclose(rates[0], 0.1)
    np.testing.assert_allclose(rates[8], 0.1)
    assert rates[-1] < 0.01
    counts = {int(x) for x in jax.tree.leaves(trainer.state.opt_state) if x.dtype == jnp.int32}
    assert counts == {16, 24}


def test_states_of_other_forms_or_of_learned_optimizers_are_not_kept():
    params = {"w": jnp.ones(2)}
    adam, sgd = optax.adam(0.1), optax.sgd(0.1, momentum=0.9)
    assert reusable_state(adam.init(params), sgd.init(params), sgd) is None
    other = {"w": jnp.ones(3)}
    assert reusable_state(adam.init(other), adam.init(params), adam) is None
    injected = optax.inject_hyperparams(optax.adam)(optax.linear_schedule(1.0, 0.0, 9))
    fresh = injected.init(params)
    _, old = injected.update({"w": jnp.ones(2)}, fresh, params)
    begun = restart_schedules(old, fresh)
    assert int(begun.count) == 0
    assert float(begun.hyperparams["learning_rate"]) == 1.0
    assert int(begun.inner_state[0].count) == 1


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("val/accuracy", "max"),
        ("val/top5_accuracy", "max"),
        ("val/top1_error", "min"),
        ("val_clean/F1", "max"),
        ("val/macroF1", "max"),
        ("val/AUROC", "max"),
        ("train/acc", "max"),
        ("val/loss", "min"),
        ("val/auc_loss", "min"),
        ("val/neg_mean_squared_err", "max"),
        ("val/perplexity", "min"),
        ("val/score", None),
        ("val/accuracyless", None),
    ],
)
def test_direction_is_what_the_name_says(name, mode):
    assert direction(name) == mode
    assert Monitor(name).mode == (mode or "min")
    if mode is not None:
        opposite: Any = "min" if mode == "max" else "max"
        with pytest.raises(ConfigError, match=f"mode='{mode}'.*insist=True"):
            Monitor(name, opposite)
        assert Monitor(name, opposite, insist=True).mode == opposite


@pytest.mark.parametrize("name", [None, 3, "", ["val/loss"]])
def test_a_monitor_needs_a_name(name):
    with pytest.raises(ConfigError, match=r"Monitor\('val/loss'\)"):
        Monitor(name)


def test_a_trainer_may_be_judged_by_its_training():
    judged = type("Judged", (Regression,), {"monitor": "train/loss"})
    result = make(judged, callbacks=[EarlyStopping(patience=1, min_delta=1e6)]).train_model(
        loader(), num_epochs=9
    )
    assert (result.status, result.epoch, result.best.epoch) == ("stopped", 2, 2)
    assert result.best.metrics.keys() == {"train/loss"}


@pytest.mark.parametrize(
    ("stopping", "val", "error", "text"),
    [
        (EarlyStopping("val/loss"), False, ConfigError, "has no validation.*'train/loss'"),
        (EarlyStopping(), False, ConfigError, "has no validation"),
        (EarlyStopping("val/los"), True, MetricError, "Did you mean 'val/loss'"),
        (EarlyStopping("train/los"), False, MetricError, "Did you mean 'train/loss'"),
        (EarlyStopping(Monitor("val/loss", "max", insist=True)), True, ConfigError, "mode 'min'"),
    ],
)
def test_early_stopping_that_would_do_nothing_is_an_error_before_the_first_step(
    stopping, val, error, text
):
    trainer = make(callbacks=[stopping])
    with pytest.raises(error, match=text):
        trainer.train_model(loader(), loader(1) if val else None, num_epochs=2)
    assert trainer.step == 0


def stops_after(values: list[float], **options: Any) -> int | None:
    """Returns the epoch in which early stopping asked to stop, and that it resumes as it was."""
    stopping = EarlyStopping("val/loss", **options)
    for epoch, value in enumerate(values, start=1):
        state, stopping = stopping.get_state(), EarlyStopping("val/loss", **options)
        stopping.set_state(state)
        try:
            stopping.on_validation_end(StepInfo(epoch, epoch, None, {"val/loss": value}))
        except StopTraining:
            return epoch
    return None


@pytest.mark.parametrize(
    ("values", "options", "epoch"),
    [
        ([3, 2, 1, 0.5], {"stopping_threshold": 1.5}, 3),
        ([3, 2, 1, 9, 0], {"divergence_threshold": 8}, 4),
        ([1, 1, 1, 1, 1], {"patience": 1, "min_epochs": 4}, 4),
        ([3, 0.1, 3], {"stopping_threshold": 1, "min_epochs": 3, "patience": 9}, None),
        ([1, math.nan], {}, 2),
        ([1, math.inf], {}, 2),
        ([1, math.nan, 1], {"check_finite": False}, None),
    ],
)
def test_early_stopping_stops_where_its_options_say(values, options, epoch):
    assert stops_after(values, **options) == epoch


def test_early_stopping_that_saw_nothing_warns():
    stopping = EarlyStopping("val/loss")
    with pytest.warns(UserWarning, match="never saw 'val/loss'"):
        stopping.on_training_end(StepInfo(1, 1, None, {}, status="finished"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stopping.on_training_end(StepInfo(1, 1, None, {}, status="failed"))
    with pytest.raises(ConfigError, match="threshold"):
        EarlyStopping("val/loss", stopping_threshold="low")  # ty: ignore[invalid-argument-type]

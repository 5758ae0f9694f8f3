"""Names from other libraries, and forms that nothing calls: each error has the right form."""

from __future__ import annotations

import copy
import re
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import distaff
from distaff import Callback, EarlyStopping, Monitor, OptimizerConfig, TrainerModule, loggers, tasks
from distaff.callbacks import Callbacks
from distaff.errors import ConfigError, MetricError, UnknownNameError
from distaff.loggers import MemoryLogger
from distaff.optim.build import as_optimizer
from distaff.zoo import MLP
from scripted import Regression


def make(cls: type[Any] = Regression, **options: Any) -> Any:
    return cls(nn.Dense(1), root=None, enable_progress_bar=False, **options)


def subclass(**members: Any) -> type[Any]:
    return type("Own", (Regression,), members)


@pytest.mark.parametrize(
    ("option", "form"),
    [
        ("lr", "OptimizerConfig("),
        ("learning_rate", "OptimizerConfig("),
        ("max_epochs", "num_epochs"),
        ("exmp_input", "example_batch"),
        ("logger", "loggers=["),
        ("metrics", "extra_metrics("),
        ("accumulate", "OptimizerConfig(accumulate"),
        ("log_every_n_step", "'log_every_n_steps'"),
        ("num_classes", "the model's last layer"),
        ("budget", 'num_epochs="1e9 tokens"'),
    ],
)
def test_option_of_another_library_names_the_right_form(option, form):
    with pytest.raises(ConfigError, match=f"no option {option!r}.*{re.escape(form)}"):
        make(**{option: 1})


@pytest.mark.parametrize(
    ("arguments", "form"),
    [
        ({"epochs": 3}, "num_epochs"),
        ({"num_epochs": 3, "validation_data": None}, "val_loader"),
        ({"num_epochs": 3, "callbacks": []}, "constructor"),
        ({"num_epoch": 3}, "'num_epochs'"),
        ({}, "num_epochs"),
    ],
)
def test_wrong_call_of_train_model_names_the_right_form(arguments, form):
    with pytest.raises(ConfigError, match=form):
        make().train_model([], **arguments)


@pytest.mark.parametrize("task", [tasks.Classifier, tasks.Regressor, tasks.LanguageModel])
def test_constructor_without_a_model_or_with_more_by_position_is_an_error(task):
    name = task.__name__
    with pytest.raises(ConfigError, match=rf"{name} takes only the model.*the model's last layer"):
        task(MLP((8, 10)), 10)
    with pytest.raises(ConfigError, match=rf"{name} needs a model. Write {name}\(model"):
        task(seed=1)
    trainer = task(MLP((8, 10)), root=None)
    assert copy.copy(trainer).model is trainer.model


def test_a_number_of_epochs_by_position_is_an_error():
    with pytest.raises(ConfigError, match=r"train_model.*num_epochs"):
        make().train_model([], None, None, 3)


@pytest.mark.parametrize(
    ("name", "form"), [("fit", "train_model"), ("evaluate", "eval_model"), ("params", "state")]
)
def test_attribute_of_another_library_names_the_right_form(name, form):
    with pytest.raises(UnknownNameError, match=f"{name}.*{form}"):
        getattr(make(), name)


def test_other_attributes_are_missing_as_ever():
    with pytest.raises(AttributeError, match="'Regression' object has no attribute 'mine'"):
        make().mine  # noqa: B018
    assert not hasattr(make(), "mine")


@pytest.mark.parametrize(
    ("method", "form"),
    [
        ("training_step", "loss_fn"),
        ("configure_optimizers", "init_optimizer"),
        ("on_train_epoch_end", "on_training_epoch_end"),
        ("on_traning_start", "on_training_start"),
        ("on_validation_epoch_ends", "on_validation_epoch_end"),
    ],
)
def test_method_that_nothing_calls_is_an_error(method, form):
    with pytest.raises(ConfigError, match=f"{method}, which is never called.*{form}"):
        make(subclass(**{method: lambda self, *arguments: None}))


def test_helpers_of_ones_own_are_left_alone():
    class Own(Regression):
        def training_step(self, params, batch, ctx):
            return super().loss_fn(params, batch, ctx)

        def loss_fn(self, params, batch, ctx):
            return self.training_step(params, batch, ctx)

        def on_plateau(self):
            """A helper."""

        def forward(self, x):
            """Another."""

    assert isinstance(make(Own), Own)


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("loss_fn", lambda self, params, batch: 0),
        ("loss_fn", lambda params, batch, ctx: 0),
        ("loss_fn", 3),
        ("on_training_epoch_end", lambda self, epoch: None),
        ("on_validation_epoch_end", lambda self, epoch, metrics: None),
        ("on_training_start", lambda self, trainer: None),
        ("init_optimizer", lambda self, num_epochs, num_steps_per_epoch: None),
        ("run_model_init", lambda self, key: None),
        ("create_functions", lambda self, config: None),
        ("tracker", lambda self, iterable, desc: iterable),
        ("is_new_model_better", lambda self, metrics: True),
    ],
)
def test_override_with_other_arguments_is_an_error(name, override):
    with pytest.raises(ConfigError, match=rf"Own\.{name}.*def {name}\(self"):
        make(subclass(**{name: override}))


def test_overrides_with_other_names_or_more_are_fine():
    made = subclass(
        loss_fn=staticmethod(lambda p, b, c, scale=1: 0),
        on_training_epoch_end=lambda self, *everything: None,
        on_validation_epoch_end=lambda self, i, m, loader, **more: None,
    )
    assert isinstance(make(made), made)


class Misspelt(Callback):
    def on_train_end(self, info):
        """Is never called."""


class Unlike(Callback):
    def on_epoch_end(self, trainer, info):
        """Cannot be called."""


class Aliased(Callback):
    def on_training_end(self, info):
        """Is called, whatever else it is called."""

    on_train_end = on_training_end


@pytest.mark.parametrize(
    ("given", "form"),
    [
        (EarlyStopping(), r"callbacks=\[EarlyStopping\(\.\.\.\)\]"),
        ([EarlyStopping], r"callbacks=\[EarlyStopping\(\.\.\.\)\]"),
        (EarlyStopping, "subclass of distaff.Callback"),
        ([lambda info: None], "subclass of distaff.Callback"),
        (print, "subclass of distaff.Callback"),
        ("early_stopping", "subclass of distaff.Callback"),
        ({"stop": EarlyStopping()}, "subclass of distaff.Callback"),
        ([Misspelt()], "on_train_end, which is never called. Write on_training_end"),
        ([Unlike()], r"Unlike\.on_epoch_end .*def on_epoch_end\(self, info\)"),
    ],
)
def test_callbacks_of_a_wrong_form_are_an_error(given, form):
    with pytest.raises(ConfigError, match=form):
        make(callbacks=given)


def test_callbacks_may_be_none_or_have_a_second_name():
    assert Callbacks(None).callbacks == ()
    make(callbacks=[Aliased()])


class Unfinished:
    def log_metrics(self, metrics, step):
        """Is like Lightning's."""


class OtherArguments(MemoryLogger):
    def log_metrics(self, metrics, step):  # ty: ignore[invalid-method-override]
        """Takes no epoch."""


@pytest.mark.parametrize(
    ("given", "form"),
    [
        ("wandb", r"loggers=\['wandb'\]"),
        (["cvs"], "Did you mean 'csv'"),
        (MemoryLogger(), r"loggers=\[MemoryLogger\(\.\.\.\)\]"),
        ([MemoryLogger], r"loggers=\[MemoryLogger\(\.\.\.\)\]"),
        (MemoryLogger, r"loggers=\[MemoryLogger\(\.\.\.\)\]"),
        ({"a": MemoryLogger()}, "a list of loggers"),
        ([Unfinished()], r"lacks \['log_config', 'close'\]"),
        ([OtherArguments()], r"OtherArguments\.log_metrics"),
    ],
)
def test_loggers_of_a_wrong_form_are_an_error(given, form):
    with pytest.raises(ConfigError, match=form):
        make(loggers=given)


def test_loggers_may_be_none_or_a_generator():
    assert make(loggers=None).loggers == ()
    assert len(make(loggers=(each for each in [loggers.NullLogger()])).loggers) == 1


@pytest.mark.parametrize(
    ("given", "form"),
    [
        ("adam", r"OptimizerConfig\('adam'\)"),
        (optax.adam, "Call it"),
        (OptimizerConfig, "an Optax transformation"),
        (1e-3, "an Optax transformation"),
        (lambda: optax.adam(1e-3), "total_steps"),
        (lambda steps, model: optax.adam(1e-3), "total_steps"),
        ((optax.adam(1e-3).init, optax.adam(1e-3).update), "an Optax transformation"),
    ],
)
def test_optimizers_of_a_wrong_form_are_an_error_of_the_constructor(given, form):
    with pytest.raises(ConfigError, match=form):
        make(optimizer=given)


def test_optimizers_of_a_right_form_are_taken_as_they_are():
    for given in (OptimizerConfig("sgd"), optax.adam(1e-3), lambda steps: optax.adam(1e-3)):
        assert as_optimizer(given) is given


def test_result_names_the_nearest_metric():
    batch = {"x": np.ones((2, 3), np.float32), "y": np.ones(2, np.float32)}
    result = make().train_model([batch], [batch], num_epochs=1)
    with pytest.raises(KeyError, match="Did you mean 'val/loss'") as caught:
        result.metrics["val/los"]
    assert isinstance(caught.value, MetricError)
    assert (result.metrics.get("val/los"), "val/los" in result.metrics) == (None, False)
    with pytest.raises(UnknownNameError, match=r"metrics\.jsonl"):
        result.logs  # ty: ignore[unresolved-attribute]  # noqa: B018
    assert not hasattr(result, "mine")
    with pytest.raises(MetricError, match="Known: 'loss'"):
        make(example_batch=batch).eval_model([batch])["accuracy"]


def test_early_stopping_names_arguments_of_other_libraries():
    with pytest.raises(ConfigError, match=r"restore_best_weights.*best model is loaded"):
        EarlyStopping(restore_best_weights=True)  # ty: ignore[unknown-argument]
    with pytest.raises(ConfigError, match=r"Monitor.*mode"):
        EarlyStopping("val/acc", mode="max")  # ty: ignore[unknown-argument]
    assert EarlyStopping("val/acc").monitor == Monitor("val/acc", "max")


def test_a_trainer_without_a_loss_names_the_method():
    class Lossless(TrainerModule):
        def compute_loss(self, params, batch, ctx):
            """Has another name."""

    batch = {"x": np.ones((2, 3), np.float32)}
    with pytest.raises(distaff.DistaffError, match="Define loss_fn"):
        make(Lossless).train_model([batch], num_epochs=1)


class ByHand(Regression):
    """Written as for a trainer that keeps the Linen module itself as its model."""

    def run_model_init(self, example_batch, key):
        return self.model.init(key, example_batch["x"])

    def loss_fn(self, params, batch, ctx):
        return (self.model.apply({"params": params}, batch["x"])[:, 0] - batch["y"]) ** 2


@pytest.mark.usefixtures("optimized")
def test_model_is_called_as_linen_has_it():
    batch = {"x": np.ones((2, 3), np.float32), "y": np.ones(2, np.float32)}
    by_hand, usual = make(ByHand), make()
    losses = [each.train_model([batch], num_epochs=3).metrics for each in (by_hand, usual)]
    assert losses[0] == losses[1]
    made = usual.model.init({"params": jax.random.key(0)}, batch["x"])
    assert set(made) == {"params"}


def test_fields_of_an_optimizer_name_the_right_form():
    with pytest.raises(ConfigError, match=r"OptimizerConfig has no argument 'lr'.*learning_rate"):
        OptimizerConfig("adam", lr=1e-3)  # ty: ignore[unknown-argument]
    with pytest.raises(ConfigError, match=r"optimizer=optax\.adamw"):
        OptimizerConfig(optax.adam(1e-3))  # ty: ignore[invalid-argument-type]
    with pytest.raises(ConfigError, match=r"no argument 'momentum'.*options="):
        OptimizerConfig("sgd", momentum=0.9)  # ty: ignore[unknown-argument]


def test_a_constructor_that_forgot_the_trainers_is_named():
    class Forgetful(Regression):
        def __init__(self, model):
            self.mine = model

    with pytest.raises(UnknownNameError, match=r"super\(\)\.__init__"):
        Forgetful(nn.Dense(1)).train_model([], num_epochs=1)


def test_hooks_that_yield_are_an_error():
    def hook(self, epoch, metrics):
        yield epoch

    with pytest.raises(ConfigError, match="on_training_epoch_end, and does not iterate"):
        make(subclass(on_training_epoch_end=hook))

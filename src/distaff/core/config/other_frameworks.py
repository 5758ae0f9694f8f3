"""Translates names from Keras, Lightning and Flax examples, for error messages."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType
from typing import Any, ParamSpec, TypeVar

from distaff.errors import ConfigError, UnknownNameError, nearest

P = ParamSpec("P")
R = TypeVar("R")


def _by_name(entries: Mapping[str, str]) -> Mapping[str, str]:
    """Returns what to write by name; the keys of `entries` are names separated by spaces."""
    return {name: text for names, text in entries.items() for name in names.split()}


_RATE = 'optimizer=OptimizerConfig("adamw", learning_rate=...)'
_OPTIMIZER = "optimizer=OptimizerConfig(...), an Optax transformation, or init_optimizer"
_EPOCHS = "train_model(..., num_epochs=...)"
_BATCHES = "data.ArrayLoader(arrays, batch_size=...)"
_LOSS = "loss_fn(self, params, batch, ctx)"
_STEPS = f"{_LOSS}, or create_functions for a custom step"
_TRAIN = "train_model(train, val, test, num_epochs=...)"
_EVAL = "eval_model(loader)"
_FIND_RATE = "tune.find_learning_rate(trainer, train)"
_FIND_SIZE = "tune.find_batch_size(trainer, train)"
_MONITOR = "the class attribute monitor = Monitor(name)"

OPTIONS = _by_name(
    {
        "lr learning_rate weight_decay momentum lr_scheduler": _RATE,
        "optimizers optim tx opt": _OPTIMIZER,
        "epochs max_epochs num_epochs n_epochs": _EPOCHS,
        "max_steps num_steps": 'train_model(..., num_epochs="10000 steps")',
        "budget max_tokens": 'train_model(..., num_epochs="1e9 tokens")',
        "shuffle num_workers": _BATCHES,
        "exmp_input example_input input_shape": "example_batch=batch",
        "logger tensorboard wandb": 'loggers=["tensorboard"], or "wandb"',
        "callback hooks": "callbacks=[...]",
        "loss loss_fn criterion": f"the method {_LOSS}",
        "metrics": "the method extra_metrics(self, outputs, batch, ctx) of a task",
        "monitor early_stopping": f"{_MONITOR}, or a callback EarlyStopping()",
        "gpus devices accelerator": "nothing: JAX_PLATFORMS chooses the device",
        "random_seed rng key rng_seed": "seed=...",
        "log_dir logdir default_root_dir checkpoint_dir": "root=...",
        "ckpt_path resume_from_checkpoint": "resume=..., or init_from=path",
        "gradient_clip_val clip_norm": "OptimizerConfig(clip_norm=...)",
        "verbose progress_bar": "enable_progress_bar=...",
        "limit_train_batches limit_val_batches": "limit_batches=...",
        "accumulate accumulate_grad_batches": "OptimizerConfig(accumulate=...)",
        "val_check_interval eval_steps validation_freq": 'val_every="500 steps", or "2 epochs"',
        "num_classes num_outputs num_labels": "nothing: the model's last layer has the number",
        "run_eagerly": "debug=True",
        "gradient_checkpointing activation_checkpointing": 'remat="Block_*", or "dots_saveable"',
        "auto_lr_find": _FIND_RATE,
        "auto_scale_batch_size": _FIND_SIZE,
        "use_ema ema_decay ema_momentum model_ema ema_rate": "ema=0.999",
        "swa swa_epoch_start swa_start": "swa_from_epoch=...",
    }
)
"""Options of the trainer, and what to write instead."""

_CONSTRUCTOR = "it as an option of the trainer's constructor"

ARGUMENTS = _by_name(
    {
        "epochs max_epochs n_epochs": "num_epochs=...",
        "validation_data val_data val_dataloaders": "val_loader=...",
        "train_dataloaders train_data datamodule x": "train_loader=...",
        "batch_size": f"{_CONSTRUCTOR} for arrays, or {_BATCHES}",
        "shuffle": _BATCHES,
        "validation_split test_size": "train, val = data.split((x, y), (0.8, 0.2))",
        "y": "train_model((x, y), num_epochs=...)",
        "max_steps num_steps": 'num_epochs="10000 steps"',
        "budget max_tokens": 'num_epochs="1e9 tokens", "10000 steps" or "30m"',
        "callbacks loggers logger optimizer seed verbose ckpt_path resume": _CONSTRUCTOR,
        "lr learning_rate": _RATE,
    }
)
"""Arguments of `train_model` and of evaluations, and what to write instead."""

OPTIMIZER = _by_name(
    {
        "lr rate step_size learningrate": "learning_rate=...",
        "optimizer optim type": "name=...",
        "gradient_clip_val max_norm clipnorm clip": "clip_norm=...",
        "warmup num_warmup_steps": "warmup_steps=...",
        "scheduler lr_scheduler": "schedule=...",
        "reduce_on_plateau reduce_lr_on_plateau": "plateau=optim.Plateau(...)",
        "cooldown_steps num_decay_steps decay_fraction": "decay_steps=...",
        "accumulate_grad_batches every_k_schedule": "accumulate=...",
        "momentum b1 b2 eps nesterov": "options={...}, as in Optax",
    }
)
"""Fields of an `OptimizerConfig`, and what to write instead."""

STOPPING = _by_name(
    {
        "threshold": "stopping_threshold=...",
        "start_from_epoch": "min_epochs=...",
        "restore_best_weights verbose": "nothing: the best model is loaded",
        "mode": 'monitor=Monitor(name, mode="max")',
        "metric metric_name": "monitor=...",
    }
)
"""Arguments of `EarlyStopping`, and what to write instead."""

CALLS = _by_name(
    {
        "fit train train_and_evaluate train_on_batch": _TRAIN,
        "compile": "nothing: steps are compiled automatically; options go to the constructor",
        "evaluate validate test test_model": _EVAL,
        "save_checkpoint save_weights save": "export_weights(path)",
        "load_checkpoint load": "load_from_checkpoint(path), or load_weights",
        "params batch_stats opt_state": "trainer.state",
        "summary tabulate": "print_tabulate(example_batch)",
        "lr_find lr_finder find_learning_rate": _FIND_RATE,
        "scale_batch_size find_batch_size": _FIND_SIZE,
        "log log_dict log_metrics": "trainer.last_run.logger.log_metrics",
        "current_epoch": "trainer.epoch",
        "global_step": "trainer.step",
        "hparams save_hyperparameters": "nothing: arguments are recorded",
        "callback_metrics logged_metrics last_metrics": "trainer.last_run.state.last_metrics",
        "recording logger": "trainer.last_run.logger, or last_run.path",
        "report": "trainer.last_run.report",
        "best_models": "trainer.last_run.best_models",
    }
)
"""Attributes and methods of a trainer, and what to use instead."""

RESULTS = _by_name(
    {
        "logs records": "result.history, or result.path / 'metrics.jsonl'",
        "plot curves learning_curves": "result.figure()",
        "model params state best_params": "trainer.state, or bind_model()",
        "best_metrics best_epoch best_score": "result.best",
        "loss accuracy val_loss test_loss": "result.metrics['val/loss']",
    }
)
"""Attributes of a result, and what to use instead."""

_VALIDATION_END = "on_validation_epoch_end(self, epoch, metrics, val_loader)"
_EPOCH_END = "on_training_epoch_end(self, epoch, metrics)"
_TRAINING_END = "the event on_training_end of a Callback"
_STEP_END = "the event on_step_end of a Callback"
_TRAIN_EPOCH = "train_epoch(self, train_loader, epoch), which calls super().train_epoch"
_EVAL_MODEL = "eval_model(self, loader, prefix), which calls super().eval_model"

METHODS = _by_name(
    {
        "training_step validation_step test_step eval_step train_step": _STEPS,
        "predict_step": "predict_fn(self, params, batch, ctx)",
        "configure_optimizers configure_optimizer": _OPTIMIZER,
        "configure_callbacks": "callbacks=[...]",
        "on_fit_start on_train_start on_train_begin": "on_training_start(self)",
        "on_train_epoch_end on_epoch_end training_epoch_end": _EPOCH_END,
        "validation_epoch_end on_validation_end": _VALIDATION_END,
        "on_fit_end on_train_end on_training_end on_exception": _TRAINING_END,
        "on_step_end on_train_batch_end on_batch_end on_training_step_end": _STEP_END,
        "on_epoch_start on_train_epoch_start": _TRAIN_EPOCH,
        "on_epoch_begin on_training_epoch_start": _TRAIN_EPOCH,
        "on_validation_start on_validation_epoch_start": _EVAL_MODEL,
        "on_save_checkpoint on_checkpoint": "save_model(self, metrics, is_best)",
        "on_before_optimizer_step optimizer_step": "an Optax transformation",
        "on_train_batch_start on_before_batch_transfer": "augment(self, batch, key)",
    }
)
"""Methods of a trainer's subclass that nothing calls, and what to write instead."""

EVENTS = _by_name(
    {
        "on_train_begin on_train_start on_fit_start": "on_training_start",
        "on_train_end on_fit_end teardown_run on_exception": "on_training_end",
        "on_train_batch_end on_batch_end on_training_step_end": "on_step_end",
        "on_batch_begin on_batch_start on_train_batch_start": "on_step_end",
        "on_train_batch_begin on_before_zero_grad": "on_step_end",
        "on_train_epoch_end on_training_epoch_end": "on_epoch_end",
        "on_epoch_begin on_epoch_start on_train_epoch_start": "on_epoch_end",
        "on_validation_epoch_end on_test_end": "on_validation_end",
        "on_validation_start on_validation_epoch_start": "on_validation_end",
        "on_test_begin on_test_start": "on_validation_end",
        "on_save_checkpoint": "on_checkpoint, and get_state for the state to save",
        "on_load_checkpoint load_state_dict": "set_state",
        "state_dict": "get_state",
    }
)
"""Methods of a callback that nothing calls, and what to write instead."""

_CLOSE = 0.8


def remedy(name: str, known: Iterable[str], table: Mapping[str, str]) -> str:
    """Returns what to write for an unknown name: the table's entry, or else the nearest name."""
    return f"Write {table[name]}." if name in table else nearest(name, known)


def unknown_trainer_name(owner: Any, name: str) -> AttributeError:
    """Returns the error for an attribute that a trainer does not have, or does not have yet."""
    if "config" in vars(owner) or name.startswith("__"):
        return unknown_name(owner, name, CALLS)
    return UnknownNameError(
        f"{type(owner).__name__!r} object has no attribute {name!r}. Call "
        "super().__init__(model, **options) in its constructor first.",
        name=name,
        obj=owner,
    )


def unknown_name(owner: Any, name: str, table: Mapping[str, str]) -> AttributeError:
    """Returns the error for an attribute that does not exist; `table` suggests what to use."""
    text = f"{type(owner).__name__!r} object has no attribute {name!r}"
    if name in table:
        return UnknownNameError(f"{text}. Use {table[name]}.", name=name, obj=owner)
    return AttributeError(text, name=name, obj=owner)


def spelled(table: Mapping[str, str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a function suggest the right name for an unknown or missing keyword argument.

    Args:
        table: names from other frameworks, and what to write instead.

    Returns:
        A decorator, whose function raises ConfigError instead of TypeError for its arguments.
    """

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        known = [name for name in signature.parameters if name != "self"]
        shown = str(signature).replace("self, ", "").split(" -> ")[0]
        name = getattr(function, "__qualname__", "").removesuffix(".__init__").split(".")[-1]

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for keyword in kwargs:
                if keyword not in signature.parameters:
                    text = remedy(keyword, known, table)
                    raise ConfigError(f"{name} has no argument {keyword!r}. {text}")
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise ConfigError(f"{name}: {error}. Its arguments are {shown}.") from None
            return function(*args, **kwargs)

        return checked

    return decorated


def spell(cls: type, table: Mapping[str, str]) -> None:
    """Makes the constructor of a dataclass suggest the right names, as `spelled` does."""
    make: Any = cls.__init__
    setattr(cls, "__init__", spelled(table)(make))  # noqa: B010 - a type checker would object


def check_methods(
    cls: type, base: type, known: Iterable[str], table: Mapping[str, str], *, prefix: str = "on_"
) -> None:
    """Checks that a subclass defines no method that looks like an override, but is never called.

    Methods that the subclass itself uses, and aliases of known methods, are accepted.

    Args:
        cls: the subclass.
        base: the class whose methods are called.
        known: names of the methods that are called.
        table: names from other frameworks, and the right name of each.
        prefix: prefix of names that are compared with the known ones.

    Raises:
        ConfigError: a method that is never called has a name from `table`, or close to a known one.
    """
    known = list(known)
    right = [inspect.getattr_static(cls, name, None) for name in known]
    own = {
        name: member
        for each in reversed(cls.__mro__)
        if not issubclass(base, each)
        for name, member in vars(each).items()
        if callable(member) or isinstance(member, staticmethod | classmethod)
    }
    used = set(_names_used(own.values()))
    for name, member in own.items():
        if hasattr(base, name) or name in used or any(member is each for each in right):
            continue
        close = difflib.get_close_matches(name, known, n=1, cutoff=_CLOSE)
        if name in table or (name.startswith(prefix) and close):
            form = table[name] if name in table else close[0]
            raise ConfigError(
                f"{cls.__name__} defines {name}, which is never called. Write {form} instead. If "
                "it is your own helper, rename it."
            )


def _names_used(members: Iterable[Any]) -> Iterator[str]:
    """Yields every attribute name used in the functions of a class."""
    waiting: list[Any] = [
        getattr(inspect.unwrap(getattr(each, "__func__", each)), "__code__", None)
        for each in members
    ]
    while waiting:
        code = waiting.pop()
        if code is not None:
            yield from code.co_names
            waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]

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

_RATE = 'optimizer=OptimizerConfig("adamw", learning_rate=...)'
_OPTIMIZER = "optimizer=OptimizerConfig(...), an Optax transformation, or init_optimizer"
_EPOCHS = "train_model(..., num_epochs=...)"
_BATCHES = "data.ArrayLoader(arrays, batch_size=...)"
_LOSS = "loss_fn(self, params, batch, ctx)"
_STEPS = f"{_LOSS}, or create_functions for a custom step"
_TRAIN = "train_model(train, val, test, num_epochs=...)"
_EVAL = "eval_model(loader)"
_MONITOR = "the class attribute monitor = Monitor(name)"

OPTIONS: Mapping[str, str] = {
    **dict.fromkeys(("lr", "learning_rate", "weight_decay", "momentum", "lr_scheduler"), _RATE),
    **dict.fromkeys(("optimizers", "optim", "tx", "opt"), _OPTIMIZER),
    **dict.fromkeys(("epochs", "max_epochs", "num_epochs", "n_epochs"), _EPOCHS),
    **dict.fromkeys(("max_steps", "num_steps"), "train_model(..., steps_per_epoch=...)"),
    **dict.fromkeys(("batch_size", "shuffle", "num_workers"), _BATCHES),
    **dict.fromkeys(("exmp_input", "example_input", "input_shape"), "example_batch=batch"),
    **dict.fromkeys(("logger", "tensorboard", "wandb"), "loggers=[...]"),
    **dict.fromkeys(("callback", "hooks"), "callbacks=[...]"),
    **dict.fromkeys(("loss", "loss_fn", "criterion", "metrics"), f"the method {_LOSS}"),
    **dict.fromkeys(("monitor", "early_stopping"), f"{_MONITOR}, or a callback EarlyStopping()"),
    **dict.fromkeys(
        ("gpus", "devices", "accelerator"), "nothing: JAX_PLATFORMS chooses the device"
    ),
    **dict.fromkeys(("random_seed", "rng", "key", "rng_seed"), "seed=..."),
    **dict.fromkeys(("log_dir", "logdir", "default_root_dir", "checkpoint_dir"), "root=..."),
    **dict.fromkeys(("ckpt_path", "resume_from_checkpoint"), "resume=..., or init_from=path"),
    **dict.fromkeys(("gradient_clip_val", "clip_norm"), "OptimizerConfig(clip_norm=...)"),
    **dict.fromkeys(("verbose", "progress_bar"), "enable_progress_bar=..."),
    **dict.fromkeys(("limit_train_batches", "limit_val_batches"), "limit_batches=..."),
    "accumulate_grad_batches": "OptimizerConfig(accumulate=...)",
    "val_check_interval": "check_val_every_n_epoch=...",
    "run_eagerly": "debug=True",
}
"""Options of the trainer, and what to write instead."""

_CONSTRUCTOR = "it as an option of the trainer's constructor"

ARGUMENTS: Mapping[str, str] = {
    **dict.fromkeys(("epochs", "max_epochs", "n_epochs"), "num_epochs=..."),
    **dict.fromkeys(("validation_data", "val_data", "val_dataloaders"), "val_loader=..."),
    **dict.fromkeys(("train_dataloaders", "train_data", "datamodule", "x"), "train_loader=..."),
    **dict.fromkeys(("batch_size", "shuffle", "validation_split"), _BATCHES),
    **dict.fromkeys(("max_steps", "num_steps"), "steps_per_epoch=..., with num_epochs=1"),
    **dict.fromkeys(("callbacks", "loggers", "logger", "optimizer", "seed"), _CONSTRUCTOR),
    **dict.fromkeys(("verbose", "ckpt_path", "resume"), _CONSTRUCTOR),
    **dict.fromkeys(("lr", "learning_rate"), _RATE),
}
"""Arguments of `train_model` and of evaluations, and what to write instead."""

OPTIMIZER: Mapping[str, str] = {
    **dict.fromkeys(("lr", "rate", "step_size", "learningrate"), "learning_rate=..."),
    **dict.fromkeys(("optimizer", "optim", "type"), "name=..."),
    **dict.fromkeys(("gradient_clip_val", "max_norm", "clipnorm", "clip"), "clip_norm=..."),
    **dict.fromkeys(("warmup", "num_warmup_steps"), "warmup_steps=..."),
    **dict.fromkeys(("scheduler", "lr_scheduler"), "schedule=..."),
    **dict.fromkeys(("accumulate_grad_batches", "every_k_schedule"), "accumulate=..."),
    **dict.fromkeys(("momentum", "b1", "b2", "eps", "nesterov"), "options={...}, as in Optax"),
}
"""Fields of an `OptimizerConfig`, and what to write instead."""

STOPPING: Mapping[str, str] = {
    "threshold": "stopping_threshold=...",
    "start_from_epoch": "min_epochs=...",
    **dict.fromkeys(("restore_best_weights", "verbose"), "nothing: the best model is loaded"),
    "mode": 'monitor=Monitor(name, mode="max")',
    **dict.fromkeys(("metric", "metric_name"), "monitor=..."),
}
"""Arguments of `EarlyStopping`, and what to write instead."""

CALLS: Mapping[str, str] = {
    **dict.fromkeys(("fit", "train", "train_and_evaluate", "train_on_batch"), _TRAIN),
    "compile": "nothing: steps are compiled automatically; options go to the constructor",
    **dict.fromkeys(("evaluate", "validate", "test", "test_model"), _EVAL),
    **dict.fromkeys(("save_checkpoint", "save_weights", "save"), "export_weights(path)"),
    **dict.fromkeys(("load_checkpoint", "load"), "load_from_checkpoint(path), or load_weights"),
    **dict.fromkeys(("params", "batch_stats", "opt_state"), "trainer.state"),
    **dict.fromkeys(("summary", "tabulate"), "print_tabulate(example_batch)"),
    **dict.fromkeys(("log", "log_dict", "log_metrics"), "trainer.last_run.logger.log_metrics"),
    **dict.fromkeys(("current_epoch",), "trainer.epoch"),
    **dict.fromkeys(("global_step",), "trainer.step"),
    **dict.fromkeys(("hparams", "save_hyperparameters"), "nothing: arguments are recorded"),
    **dict.fromkeys(("callback_metrics", "logged_metrics"), "trainer.last_run.state.last_metrics"),
    **dict.fromkeys(("recording", "logger"), "trainer.last_run.logger, or last_run.path"),
    "report": "trainer.last_run.report",
    "best_models": "trainer.last_run.best_models",
    "last_metrics": "trainer.last_run.state.last_metrics",
}
"""Attributes and methods of a trainer, and what to use instead."""

RESULTS: Mapping[str, str] = {
    **dict.fromkeys(("history", "logs"), "result.path / 'metrics.jsonl', or a MemoryLogger"),
    **dict.fromkeys(("model", "params", "state", "best_params"), "trainer.state, or bind_model()"),
    **dict.fromkeys(("best_metrics", "best_epoch", "best_score"), "result.best"),
    **dict.fromkeys(("loss", "accuracy", "val_loss", "test_loss"), "result.metrics['val/loss']"),
}
"""Attributes of a result, and what to use instead."""

_VALIDATION_END = "on_validation_epoch_end(self, epoch, metrics, val_loader)"
_EPOCH_END = "on_training_epoch_end(self, epoch, metrics)"

METHODS: Mapping[str, str] = {
    **dict.fromkeys(("training_step", "validation_step", "test_step", "eval_step"), _STEPS),
    "train_step": _STEPS,
    "predict_step": "predict_fn(self, params, batch, ctx)",
    **dict.fromkeys(("configure_optimizers", "configure_optimizer"), _OPTIMIZER),
    "configure_callbacks": "callbacks=[...]",
    **dict.fromkeys(
        ("on_fit_start", "on_train_start", "on_train_begin"), "on_training_start(self)"
    ),
    **dict.fromkeys(("on_train_epoch_end", "on_epoch_end", "training_epoch_end"), _EPOCH_END),
    **dict.fromkeys(("validation_epoch_end", "on_validation_end"), _VALIDATION_END),
    **dict.fromkeys(
        ("on_fit_end", "on_train_end", "on_training_end", "on_exception"),
        "the event on_training_end of a Callback",
    ),
    **dict.fromkeys(
        ("on_step_end", "on_train_batch_end", "on_batch_end", "on_training_step_end"),
        "the event on_step_end of a Callback",
    ),
    **dict.fromkeys(
        ("on_epoch_start", "on_train_epoch_start", "on_epoch_begin", "on_training_epoch_start"),
        "train_epoch(self, train_loader, epoch), which calls super().train_epoch",
    ),
    **dict.fromkeys(
        ("on_validation_start", "on_validation_epoch_start"),
        "eval_model(self, loader, prefix), which calls super().eval_model",
    ),
    **dict.fromkeys(("on_save_checkpoint", "on_checkpoint"), "save_model(self, metrics, is_best)"),
    **dict.fromkeys(("on_before_optimizer_step", "optimizer_step"), "an Optax transformation"),
    **dict.fromkeys(
        ("on_train_batch_start", "on_before_batch_transfer"), "augment(self, batch, key)"
    ),
}
"""Methods of a trainer's subclass that nothing calls, and what to write instead."""

EVENTS: Mapping[str, str] = {
    **dict.fromkeys(("on_train_begin", "on_train_start", "on_fit_start"), "on_training_start"),
    **dict.fromkeys(
        ("on_train_end", "on_fit_end", "teardown_run", "on_exception"), "on_training_end"
    ),
    **dict.fromkeys(("on_train_batch_end", "on_batch_end", "on_training_step_end"), "on_step_end"),
    **dict.fromkeys(("on_train_epoch_end", "on_training_epoch_end"), "on_epoch_end"),
    **dict.fromkeys(("on_validation_epoch_end", "on_test_end"), "on_validation_end"),
    **dict.fromkeys(("on_epoch_begin", "on_epoch_start", "on_train_epoch_start"), "on_epoch_end"),
    **dict.fromkeys(("on_batch_begin", "on_batch_start", "on_train_batch_start"), "on_step_end"),
    **dict.fromkeys(("on_train_batch_begin", "on_before_zero_grad"), "on_step_end"),
    **dict.fromkeys(("on_validation_start", "on_validation_epoch_start"), "on_validation_end"),
    **dict.fromkeys(("on_test_begin", "on_test_start"), "on_validation_end"),
    "on_save_checkpoint": "on_checkpoint, and get_state for the state to save",
    "on_load_checkpoint": "set_state",
    "state_dict": "get_state",
    "load_state_dict": "set_state",
}
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
    """Returns the error for an attribute that an object does not have.

    Args:
        owner: the object.
        name: name of the attribute.
        table: names from other frameworks, and what to use instead.
    """
    text = f"{type(owner).__name__!r} object has no attribute {name!r}"
    if name in table:
        return UnknownNameError(f"{text}. Use {table[name]}.", name=name, obj=owner)
    return AttributeError(text, name=name, obj=owner)


def spelled(table: Mapping[str, str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a function suggest the right name for an unknown or missing keyword argument.

    Args:
        table: names from other frameworks, and what to write instead.

    Returns:
        A decorator. The decorated function raises ConfigError where Python would raise TypeError
        for its arguments.
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
        ConfigError: a method that is never called has a name from another framework, or a name
            close to a known one.
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

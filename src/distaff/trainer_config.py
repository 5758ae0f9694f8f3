"""The options every trainer has, and what a run returns."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from distaff.compiling import Recompile
from distaff.duration import seconds_of
from distaff.errors import ConfigError, nearest

C = TypeVar("C", bound="TrainerConfig")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The options of every trainer; a subclass of the trainer may add its own.

    Args:
        name: the folder of its runs, `<root>/<name>/<version>`; by default the class's name.
        root: the folder of all runs; None to write nothing.
        seed: of the parameters, dropout, and every other random number of the model.
        check_val_every_n_epoch: epochs between validations, and between checkpoints.
        log_every_n_steps: steps per line of training metrics in the log.
        steps_per_call: steps that run as one program: more of them cost the host less. "auto"
            measures in the first steps whether that is faster, and how many; where a callback
            watches steps, it is 1.
        keep_last: newest checkpoints to keep, beside the best. Older ones are removed once a new
            one is in place.
        keep_best: how many of the best models' checkpoints to keep, at least 1.
        keep_every: keep also the checkpoints whose step is a multiple of it. Checkpoints are made
            at the ends of epochs: a multiple that lies within one has none, and keeps nothing.
        on_failed_save: what a checkpoint that cannot be written leads to, such as on a full disk:
            "raise" ends the run, within one step; "warn" warns and goes on, and tries the next one.
            A run whose best model was lost that way ends with the best of those that were written,
            or with the last weights, and says so.
        resume: what a start does with a run of the same name that did not come to its end. "auto"
            goes on with the newest one of the same seed, model and optimizer, from its newest
            valid checkpoint; "must" goes on whatever is other now, and is an error where there is
            none; "never" begins a new run. A number goes on from the checkpoint of that step.
        max_time: the longest a run may last, such as "3h30m", a number of seconds, or a
            `timedelta`. It is then saved, and ends as interrupted.
        table_depth: levels of modules in the model table, 0 for the whole model in one line; None
            for every module and each of its arrays.
        enable_progress_bar: False draws nothing.
        debug: run every step as plain Python, so that breakpoints and prints work.
        recompile: what a training or evaluation program that compiles again, after its first time,
            leads to: "warn" says which leaf has changed and what to do, "error" raises
            `RecompileError`, "ignore" says nothing.
        tune_process: keep compiled programs on disk (`distaff.compile_cache`), and have the C
            library keep the memory that steps on the CPU need again (`distaff.allocator`).

    Raises:
        ConfigError: an option is out of its range.
    """

    name: str = ""
    root: str | None = "runs"
    seed: int = 42
    check_val_every_n_epoch: int = 1
    log_every_n_steps: int = 50
    steps_per_call: int | Literal["auto"] = "auto"
    keep_last: int = 2
    keep_best: int = 1
    keep_every: int | None = None
    on_failed_save: Literal["raise", "warn"] = "raise"
    resume: Literal["auto", "must", "never"] | int = "auto"
    max_time: str | float | None = None
    table_depth: int | None = None
    enable_progress_bar: bool = True
    debug: bool = False
    recompile: Recompile = "warn"
    tune_process: bool = True

    def __post_init__(self) -> None:
        for name in ("check_val_every_n_epoch", "log_every_n_steps", "keep_last", "keep_best"):
            check_count(name, getattr(self, name))
        if self.keep_every is not None:
            check_count("keep_every", self.keep_every)
        if self.steps_per_call != "auto":
            check_count("steps_per_call", self.steps_per_call)
        check_choice("recompile", self.recompile, get_args(Recompile))
        check_choice("on_failed_save", self.on_failed_save, ("raise", "warn"))
        if self.resume not in ("auto", "must", "never") and type(self.resume) is not int:
            known = nearest(str(self.resume), ("auto", "must", "never"))
            raise ConfigError(f"resume has no value {self.resume!r}. {known} Or pass a step.")
        if self.max_time is not None:
            seconds_of(self.max_time, "max_time")
        depth = self.table_depth
        if depth is not None and (not isinstance(depth, Integral) or depth < 0):
            raise ConfigError(f"table_depth is a whole number, at least 0, or None; got {depth!r}.")
        if not isinstance(self.seed, Integral):
            raise ConfigError(f"seed is a whole number; got {self.seed!r}.")


def check_count(name: str, value: Any) -> None:
    """Checks that an option is a number of things.

    Raises:
        ConfigError: it is not a whole number, or less than 1.
    """
    if not isinstance(value, Integral) or value < 1:
        raise ConfigError(f"{name} is a whole number, at least 1; got {value!r}.")


def check_choice(name: str, value: Any, known: Collection[str]) -> None:
    """Checks that an option has one of its values.

    Raises:
        ConfigError: it has another; the nearest one is named.
    """
    if value not in known:
        raise ConfigError(f"{name} has no value {value!r}. {nearest(str(value), known)}")


def make_config(cls: type[C], options: dict[str, Any], owner: type) -> C:
    """Makes a trainer's options from keyword arguments.

    Args:
        cls: the class of the options.
        options: their values.
        owner: the trainer; what its constructors take besides is named with the options.

    Raises:
        ConfigError: an option is unknown; the nearest one is named.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    for name in options:
        if name not in known:
            known += [
                parameter.name
                for base in owner.__mro__
                for parameter in inspect.signature(base.__init__).parameters.values()
                if parameter.kind is parameter.KEYWORD_ONLY
            ]
            raise ConfigError(f"{owner.__name__} has no option {name!r}. {nearest(name, known)}")
    return cls(**options)


class Best(NamedTuple):
    """The best model so far.

    Attributes:
        step: completed optimizer updates.
        epoch: completed epochs.
        metrics: its validation metrics, as `val/...`.
    """

    step: int
    epoch: int
    metrics: dict[str, Any]


class TrainResult(NamedTuple):
    """How a run ended.

    Attributes:
        status: `"finished"`; `"stopped"` if a callback stopped it, `"pruned"` if a search did.
        reason: why it was stopped; empty otherwise.
        step: completed optimizer updates.
        epoch: completed epochs.
        metrics: of the last training epoch (`train/`), the best validation (`val/`) and the test
            (`test/`).
        best: the best model; None without validation, or if none could be written.
        path: the run directory; None if nothing is written.
    """

    status: str
    reason: str
    step: int
    epoch: int
    metrics: dict[str, Any]
    best: Best | None
    path: Path | None

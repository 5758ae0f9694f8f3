"""The options every trainer has, and what a run returns."""

from __future__ import annotations

import dataclasses
import inspect
import math
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, NamedTuple, Never, TypeAlias, TypeVar, get_args

from distaff.compiling import Recompile
from distaff.duration import seconds_of
from distaff.errors import ConfigError, nearest
from distaff.habits import OPTIONS, RESULTS, remedy, unknown_name
from distaff.number import whole
from distaff.paths import as_path

C = TypeVar("C", bound="TrainerConfig")

BadNumbersPolicy: TypeAlias = Literal["raise", "skip", "rollback"]
BadInputPolicy: TypeAlias = Literal["raise", "warn", "ignore"]
SpikePolicy: TypeAlias = Literal["ignore", "raise", "skip", "rollback"]


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
            estimates a good number from the operations of a step and the shapes of its arrays, so
            that equal runs have equal numbers; on the CPU it is 1 for a model with convolutions.
            "measure" times both forms before the first step, on a copy of the state, and the run
            keeps the faster one. Both are 1 where a callback watches steps.
        keep_last: newest checkpoints to keep, beside the best. Older ones are removed once a new
            one is in place.
        keep_best: how many of the best models' checkpoints to keep, at least 1.
        keep_every: keep also the checkpoints whose step is a multiple of it. Checkpoints are made
            at the ends of epochs: a multiple that lies within one has none, and keeps nothing.
        on_failed_save: what a checkpoint that cannot be written leads to, such as on a full disk:
            "raise" ends the run, within one step; "warn" warns and goes on, and tries the next one.
            It holds for every other file of a run too, which is written later if it can be.
            A run whose best model was lost that way ends with the best of those that were written,
            or with the last weights, and says so.
        on_failed_log: what a logger of your own that raises an error leads to, such as one whose
            server is away: "warn" warns, leaves a gap there and tries the next call; "raise" ends
            the run.
        resume: whether to resume an unfinished run of the same name. "auto" resumes the same run
            only: of the same training step, data, seed and start weights; anything else begins a
            new run, and a line says what changed. "must" raises an error where there is none, or
            where something changed; "never" begins a new run. A number resumes as "must" does,
            from the checkpoint of that step.
        save_every: about how much time lies between two checkpoints within an epoch, beside those
            at its end: what is lost at most where a machine dies. None for no such checkpoints.
        allow_inexact_resume: go on also with a loader that is read anew and yields other batches
            than before, so that examples are missed or seen twice; a line then says so. By default
            this is an error.
        allow_changes: under `resume="must"` or a number, resume a run although something changed,
            such as the loss or the data; a warning lists all of it.
        keep_optimizer: whether a second call of `train_model` keeps the optimizer's state, such as
            Adam's moments. False begins with a new one. The schedule of an `OptimizerConfig`, or
            of a function of the number of steps, is made for one call, and begins again.
        max_time: the longest a run may last, such as "3h30m", a number of seconds, or a
            `timedelta`. It is then saved, and ends as interrupted.
        on_bad_numbers: what a step leads to that makes the loss, or a number of the state, NaN or
            infinite. "raise" ends the run with `NonFiniteError`, which says where the first bad
            number came from; "skip" leaves the state as it was before that step; "rollback" goes
            back to the last checkpoint, and on without the batches around that step.
        on_loss_spike: likewise for a loss that stands out from those before it; by default nobody
            looks for one.
        spike_threshold: how many standard deviations above the median of the last 128 losses a
            spike is, by a robust estimate.
        max_skips: how many steps in a row may be skipped, and how often a run may go back.
        on_bad_input: what to do about values that are surely wrong: NaN in the first batch of a
            loader, and in any batch labels or tokens that the model does not have, or weights that
            are negative. "raise" raises `BatchError`, "warn" warns, "ignore" does not look.
        nan_ok: names of the leaves of a batch in which NaN stands for a missing value, such as
            `("y",)`; of a tuple, `("1",)`. It is then no bad input. A `Regressor` leaves such
            targets out; a loss of your own does so itself.
        stuck_after: how long a run may make no progress until the log is told where every thread
            stands; None to watch nothing. Compiling may take six times as long.
        limit_batches: take at most this many batches of each loader in an epoch. The training goes
            on in the next epoch with those that follow; None for all.
        overfit_batches: train in each epoch on the same first batches of the train loader, this
            many, and validate on them: their loss is to go to zero. None for a usual run.
        fast_dev_run: try the code out: one epoch of one batch of each loader; nothing is written.
        check_validation: evaluate one batch of each validation loader before the training begins,
            so that a mistake in it shows at once.
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
    steps_per_call: int | Literal["auto", "measure"] = "auto"
    keep_last: int = 2
    keep_best: int = 1
    keep_every: int | None = None
    on_failed_save: Literal["raise", "warn"] = "raise"
    on_failed_log: Literal["raise", "warn"] = "warn"
    resume: Literal["auto", "must", "never"] | int = "auto"
    save_every: str | float | None = "10m"
    allow_inexact_resume: bool = False
    allow_changes: bool = False
    keep_optimizer: bool = True
    max_time: str | float | None = None
    on_bad_numbers: BadNumbersPolicy = "raise"
    on_loss_spike: SpikePolicy = "ignore"
    spike_threshold: float = 8.0
    max_skips: int = 10
    on_bad_input: BadInputPolicy = "raise"
    nan_ok: tuple[str, ...] = ()
    stuck_after: str | float | None = "10m"
    limit_batches: int | None = None
    overfit_batches: int | None = None
    fast_dev_run: bool = False
    check_validation: bool = True
    table_depth: int | None = None
    enable_progress_bar: bool = True
    debug: bool = False
    recompile: Recompile = "warn"
    tune_process: bool = True

    def __post_init__(self) -> None:
        names = ("check_val_every_n_epoch", "log_every_n_steps", "keep_last", "keep_best")
        for name in (*names, "max_skips"):
            whole(name, getattr(self, name))
        for name in ("keep_every", "limit_batches", "overfit_batches"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name))
        if isinstance(self.steps_per_call, str):
            check_choice("steps_per_call", self.steps_per_call, Literal["auto", "measure"])
        else:
            whole("steps_per_call", self.steps_per_call)
        check_choice("recompile", self.recompile, Recompile)
        check_choice("on_bad_numbers", self.on_bad_numbers, BadNumbersPolicy)
        check_choice("on_loss_spike", self.on_loss_spike, SpikePolicy)
        check_choice("on_bad_input", self.on_bad_input, BadInputPolicy)
        check_choice("on_failed_save", self.on_failed_save, Literal["raise", "warn"])
        check_choice("on_failed_log", self.on_failed_log, Literal["raise", "warn"])
        if isinstance(self.nan_ok, str) or not all(isinstance(x, str) for x in self.nan_ok):
            raise ConfigError(
                f"nan_ok is a tuple of names of leaves, such as ('y',); got {self.nan_ok!r}."
            )
        object.__setattr__(self, "nan_ok", tuple(self.nan_ok))
        if self.resume not in ("auto", "must", "never") and type(self.resume) is not int:
            known = nearest(str(self.resume), ("auto", "must", "never"))
            raise ConfigError(f"resume has no value {self.resume!r}. {known} Or pass a step.")
        for name in ("save_every", "max_time", "stuck_after"):
            if getattr(self, name) is not None:
                seconds_of(getattr(self, name), name)
        if self.root is not None:
            as_path(self.root, "root")
        if not 0 < self.spike_threshold < math.inf:
            raise ConfigError(f"spike_threshold is a positive number; got {self.spike_threshold}.")
        depth = self.table_depth
        if depth is not None and (not isinstance(depth, Integral) or depth < 0):
            raise ConfigError(f"table_depth is a whole number, at least 0, or None; got {depth!r}.")
        if not isinstance(self.seed, Integral):
            raise ConfigError(f"seed is a whole number; got {self.seed!r}.")

    @property
    def most_batches(self) -> int | None:
        """The most batches of a loader to take in an epoch; None for all."""
        return 1 if self.fast_dev_run else self.limit_batches

    @property
    def writes(self) -> bool:
        """Whether runs have a directory."""
        return self.root is not None and not self.fast_dev_run


def one_by_one(config: TrainerConfig) -> TrainerConfig:
    """Returns the options of a run whose steps must not be fused.

    Raises:
        ConfigError: they ask for fused steps.
    """
    if config.steps_per_call not in (1, "auto"):
        raise ConfigError(
            f"steps_per_call={config.steps_per_call} runs steps as one program, and the batches of "
            "data.OnPolicy depend on the step before. Leave steps_per_call out."
        )
    return dataclasses.replace(config, steps_per_call=1)


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Checks that an option is one of a few words.

    Args:
        name: of the option.
        value: of it.
        choices: a `Literal` type.

    Raises:
        ConfigError: it is none of them; the nearest one is named.
    """
    if value not in get_args(choices):
        raise ConfigError(
            f"{name} has no value {value!r}. {nearest(str(value), get_args(choices))}"
        )


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
            raise ConfigError(
                f"{owner.__name__} has no option {name!r}. {remedy(name, known, OPTIONS)}"
            )
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
        status: `"finished"`; `"stopped"` if a callback stopped it, `"pruned"` if a search did;
            `"interrupted"` if it was asked to end before its time, and can be gone on with.
        reason: why it was stopped or interrupted; empty otherwise.
        step: completed optimizer updates.
        epoch: completed epochs.
        metrics: of the last training epoch (`train/`), the best validation (`val/`) and the test
            (`test/`); those of the last epoch that ended, if it was interrupted.
        best: the best model; None without validation, or if none could be written.
        path: the run directory; None if nothing is written.
        first_step: completed updates when this call began; `step` where it has trained nothing,
            because a run that it resumed, or found finished, had nothing left to train.
    """

    status: str
    reason: str
    step: int
    epoch: int
    metrics: dict[str, Any]
    best: Best | None
    path: Path | None
    first_step: int = 0

    def __getattr__(self, name: str) -> Never:
        raise unknown_name(self, name, RESULTS)

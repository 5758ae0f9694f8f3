"""Workspace: the state, programs and loaders of a trainer in this process."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import jax
import optax
from rich.console import RenderableType

from distaff.checkpoint import Store
from distaff.checkpoint.weights import EVALUATION_PARAMS
from distaff.core.typing import Batch, PyTree, Schedule
from distaff.data import InputOptions, Loader, loader_of, num_batches, num_shapes
from distaff.errors import ConfigError, DistaffError, StateError
from distaff.execution.compile.recompiles import Watch
from distaff.execution.execution import Compiled, Eager, Execution, ExecutionOptions
from distaff.execution.feed.chunk import Chunk, ChunkSize
from distaff.execution.feed.feeds import Feeds
from distaff.execution.placement import like
from distaff.execution.timers import Timers
from distaff.mesh import MeshOptions, placement_of
from distaff.optim import OptimizerLike, evaluation_params, has_evaluation_params
from distaff.optim.reuse import reusable_state
from distaff.run.directory.protocol import NullRecording, Recording
from distaff.run.display import Display
from distaff.run.evaluation import Evaluator, MayPad
from distaff.step.averages import RAW, averaged, empty, find, fits, with_epoch
from distaff.step.counted import Counted
from distaff.step.normalise import StepFn
from distaff.step.state import TrainState

_log = logging.getLogger("distaff")

PredictFn = Callable[[TrainState, Batch], PyTree]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkspaceOptions(ExecutionOptions, MeshOptions, InputOptions):
    """The options of a trainer that its workspace reads."""


class Workspace:
    """Everything that a trainer builds once; only the state changes afterwards.

    Args:
        options: how functions are compiled and run.
        display: shows progress and messages.
        predict: `(state, batch) -> outputs`.

    Attributes:
        state: the state; None before the model is initialised.
        step: completed optimizer updates of the state.
        epoch: the epoch of the state: the current one, or the last completed one.
        example_batch: a training batch, once the trainer is set up.
        table: the table of the model; None if it was not made.
        recording: the run directory and loggers of the current or last run.
        capacity: batches per call of an evaluation.
        timers: timers of the current or last run.
        plain_step: the training step without a guard, with accumulating metrics.
        measured_step: the training step that a run repeats.
        counted: the training step, with a count of its optimizer updates.
        own_step: a training step that the user's class compiled itself; None by default.
        with_rest: applies the gradients that are accumulated at the end of an epoch.
        with_epoch: adds the weights at the end of an epoch to their average.
        judged: the weights that the monitor judges: "raw", or the name of an average.
        steps_per_epoch: updates per epoch of the prepared run; None if unknown.
        schedule: the learning rate schedule of the optimizer; None if unknown.
        explains: whether to diagnose bad steps; False in a hyperparameter search.
        warned: pairs of loader and rule with an earlier warning about bad input.
        group: the study of a trial, for its loggers; None for other runs.
        origin: a line on the source of the initial weights.
        not_loaded: why the initial weights could not be loaded; a resumed run ignores it.
        fit: how the step was made to fit into memory, for the record; None if it was not asked for.
    """

    state: TrainState | None
    not_loaded: DistaffError | None
    plain_step: StepFn
    measured_step: StepFn
    counted: Counted
    with_rest: Callable[[TrainState], TrainState]

    def __init__(self, options: WorkspaceOptions, display: Display, predict: PredictFn) -> None:
        placement = placement_of(options)
        self.execution: Execution = Eager(placement) if options.debug else Compiled(placement)
        self.display, self.feeds = display, Feeds(self.execution.placement)
        self._options, self.state = options, None
        self.step = self.epoch = 0
        self.capacity, self.timers = 1, Timers()
        self.steps_per_epoch: int | None = None
        self.example_batch: Batch = None
        self.table: RenderableType | None = None
        self.recording: Recording = NullRecording()
        self.own_step: StepFn | None = None
        self.schedule: Schedule | None = None
        self.explains = True
        self.origin, self.not_loaded = "", None
        self.fit: dict[str, Any] | None = None
        self.group: str | None = None
        self.warned: set[tuple[str, str]] = set()
        self._programs: dict[str, Any] = {}
        self._evaluator: Evaluator | None = None
        self._has_evaluation_params: dict[Any, bool] = {}
        self.predict_step = self.execution.program(predict)
        self.judged = RAW
        ended = placement.updating(lambda state: with_epoch(state))
        self.with_epoch = self.execution.program(ended, donate=0)
        # A lambda per trainer, because a program lives as long as its function.
        self._evaluation_params = self.execution.program(
            lambda opt_state, params: evaluation_params(opt_state, params)
        )
        self.evaluation_watch = self.make_watch()

    def program(self, name: str, function: Callable[..., Any]) -> Any:
        """Returns the program of this name, made from a pure function at the first call."""
        if name not in self._programs:
            self._programs[name] = self.execution.program(function)
        return self._programs[name]

    def show(self, line: str) -> None:
        """Shows a line, and writes it to the log file of the run."""
        _log.info("%s", line)
        self.display.print(line)

    def ready_state(self) -> TrainState:
        """Returns the state.

        Raises:
            StateError: the model is not initialised yet.
        """
        if self.state is None:
            raise StateError(
                "The model has no parameters yet. Call train_model first, pass an example_batch to "
                "the trainer, or use load_from_checkpoint."
            )
        return self.state

    @property
    def is_set_up(self) -> bool:
        """Whether the programs of a training and an evaluation step exist."""
        return self._evaluator is not None

    @property
    def evaluator(self) -> Evaluator:
        """Evaluates the model; set once the trainer is set up.

        Raises:
            StateError: it is not.
        """
        if self._evaluator is None:
            raise StateError(
                "The trainer has a state, but no evaluation step yet. Pass an example_batch to the "
                "trainer, call train_model first, or use load_from_checkpoint."
            )
        return self._evaluator

    @evaluator.setter
    def evaluator(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def begin_optimizer(
        self, tx: optax.GradientTransformation, optimizer: OptimizerLike, *, keep: bool
    ) -> None:
        """Gives the state an optimizer and its initial state.

        Args:
            tx: the optimizer.
            optimizer: the trainer's optimizer, from which `tx` is built.
            keep: whether to keep the optimizer state of an earlier run, if it can be reused.
        """
        state, ready = self.evaluation_state(), self.ready_state()
        opt_state = self.execution.once(lambda params: tx.init(params))(state.params)
        kept = reusable_state(ready.opt_state, opt_state, optimizer)
        if keep and kept is not None:
            state, opt_state = ready, kept
        self.state = state.replace(tx=tx, opt_state=opt_state)

    def begin_averages(self, names: Collection[str], *, keep: bool) -> None:
        """Gives the state empty averages of the weights.

        Args:
            names: names of the averages; without any, the state has none.
            keep: whether to keep averages that the state has already.
        """
        state = self.execution.placement.fetched(self.ready_state())
        kept = (state.averages or {}) if keep else {}
        kept = {name: kept[name] for name in names if fits(kept.get(name), state)}
        state = state.replace(averages=None)
        if set(names) - set(kept):
            fresh = self.execution.once(lambda state: empty(state))(state)
            kept = {name: kept.get(name, fresh) for name in names}
        self.state = state.replace(averages=kept or None)

    def default_weights(self) -> str:
        """Returns the name of the judged weights, or "raw" if the state does not have them."""
        return self.judged if self.judged in (self.ready_state().averages or ()) else RAW

    def evaluation_state(self, weights: str | None = RAW) -> TrainState:
        """Returns the state with its evaluation parameters; see `optim.evaluation_params`.

        Args:
            weights: "raw", or the name of an average of the weights; None for the `judged` ones, if
                the state has them.

        Raises:
            StateError: the model is not initialised yet, or does not have this average.
            ConfigError: `weights` is another name.
        """
        state = self.ready_state()
        if weights is None:
            weights = self.default_weights()
        kind, fetched = jax.tree.structure(state.opt_state), self.execution.placement.fetched
        if kind not in self._has_evaluation_params:
            self._has_evaluation_params[kind] = has_evaluation_params(state.opt_state)
        if self._has_evaluation_params[kind]:
            state = state.replace(opt_state=fetched(state.opt_state))
        if weights != RAW:
            return self.program("averaged", averaged)(fetched(find(state, weights)), state)
        if not self._has_evaluation_params[kind]:
            return state
        return state.replace(params=self._evaluation_params(state.opt_state, state.params))

    def restore(self, store: Store, step: int, members: Iterable[str]) -> None:
        """Loads members of the state from a checkpoint.

        Args:
            store: the store of the checkpoint.
            step: the step of the checkpoint.
            members: names of the members to load. With `params` but not `opt_state`, loads the
                evaluation parameters.

        Raises:
            CheckpointError: the checkpoint cannot be read, or is of another model.
        """
        state, info = self.ready_state(), store.info(step)
        saved_as = {name: name for name in members}
        if {"params", "opt_state"} & saved_as.keys() == {"params"} and info.get(EVALUATION_PARAMS):
            saved_as["params"] = EVALUATION_PARAMS
        wanted = {saved: getattr(state, name) for name, saved in saved_as.items()}
        loaded = like(store.load(step, wanted), wanted)
        self.state = state.replace(**{name: loaded[saved] for name, saved in saved_as.items()})
        self.step, self.epoch = step, int(info.get("epoch", 0))

    @contextmanager
    def chunks(
        self,
        loader: Any,
        name: str,
        may_pad: MayPad,
        tracker: Callable[..., Iterator[Any]],
        interruptible: Callable[[Iterator[Chunk]], Iterator[Chunk]] = iter,
    ) -> Generator[Iterator[Chunk]]:
        """Yields one evaluation pass over a loader, in chunks, and shows its progress.

        Args:
            loader: any iterable of batches, or arrays.
            name: name of the loader, for errors and the display.
            may_pad: see `Evaluator.may_pad`.
            tracker: shows the progress.
            interruptible: ends the pass if the run is interrupted.
        """
        made = self.loader(loader, name)
        self.evaluation_watch.expect(loader, num_shapes=num_shapes(made))
        with self.feeds.one_pass(made, name) as view:
            capacity, length = self.capacity, num_batches(view)
            # Gathering rows of resident data would compile one program per data set.
            feed = self.feeds.of(view, name=name, resident=False)
            total = None if length is None else -(-length // capacity)
            with closing(feed.repeated(ChunkSize(capacity, capacity), even=may_pad)) as chunks:
                yield tracker(interruptible(chunks), description=name, total=total)

    def loader_name(self, prefix: Any) -> str:
        """Returns the name of a loader for errors and the display, from the prefix of its metrics.

        Raises:
            ConfigError: `prefix` is not a str, such as the labels of `eval_model(x, y)`.
        """
        if not isinstance(prefix, str):
            raise ConfigError(
                'The prefix of eval_model is a str, such as "val/"; got '
                f"{type(prefix).__name__}. Pass arrays as one tuple: eval_model((x, y))."
            )
        return prefix.rstrip("/") or "evaluate"

    def loader(self, data: Any, name: str) -> Loader:
        """Returns the loader of data to evaluate on, which is the data itself for a loader."""
        return data if self.feeds.has_view(data) else loader_of(data, self._options, name=name)

    def make_watch(self) -> Watch:
        """Returns a watch for recompilations, as configured."""
        recompile = "ignore" if self._options.debug else self._options.recompile
        return Watch(recompile, step=lambda: self.step, say=lambda text: self.display.print(text))

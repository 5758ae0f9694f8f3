"""Workspace: what a trainer has made for its model in this process, and where its state stands."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import jax
from rich.console import RenderableType

from distaff.checkpoint import Store
from distaff.checkpoint.weights import EVALUATION_PARAMS
from distaff.core.typing import Batch, PyTree, Schedule
from distaff.data import as_loader, num_batches, num_shapes
from distaff.errors import DistaffError, StateError
from distaff.execution.compile.recompiles import Watch
from distaff.execution.execution import Compiled, Eager, Execution, ExecutionOptions
from distaff.execution.feed.chunk import Chunk, ChunkSize
from distaff.execution.feed.feeds import Feeds
from distaff.execution.placement import like
from distaff.execution.timers import Timers
from distaff.optim import evaluation_params, has_evaluation_params
from distaff.run.directory.protocol import NullRecording, Recording
from distaff.run.display import Display
from distaff.run.evaluation import Evaluator, MayPad
from distaff.step.counted import Counted
from distaff.step.normalise import StepFn
from distaff.step.remainder import with_rest
from distaff.step.state import TrainState

_log = logging.getLogger("distaff")

PredictFn = Callable[[TrainState, Batch], PyTree]


class Workspace:
    """What a trainer has made for its model: it is filled once, and only the state moves on.

    Args:
        options: how functions are made to run.
        display: what the trainer shows itself on.
        predict: `(state, batch) -> outputs`.

    Attributes:
        state: the state; None before the model is initialised.
        step: completed optimizer updates of the state.
        epoch: its completed epochs, or the one that is trained.
        example_batch: a batch like those of training, once the trainer is set up.
        table: the model as a table; None where none was made.
        recording: of the next run, or of the last one.
        capacity: batches per program of an evaluation.
        timers: of the current run, or the last one.
        evaluator: evaluates; there once the trainer is set up.
        plain_step: the training step without a guard, with its metrics in accumulating form.
        measured_step: what a run repeats.
        counted: the training step, which counts the updates that it makes.
        own_step: the training step that the user's class has compiled itself; None where it is
            Distaff's.
        steps_per_epoch: updates in an epoch of the run that is prepared; None if not known.
        schedule: of the optimizer's learning rate; None where it has none that is known.
        explains: whether a bad step is looked into; a search has no time for it.
        told: what was said about bad input, each once.
        origin: a line on where the weights that a new run begins with come from.
        not_loaded: why they could not be loaded; a run that is resumed needs none.
    """

    evaluator: Evaluator
    plain_step: StepFn
    measured_step: StepFn
    counted: Counted

    def __init__(self, options: ExecutionOptions, display: Display, predict: PredictFn) -> None:
        self.execution: Execution = Eager() if options.debug else Compiled()
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
        self.told: set[tuple[str, str]] = set()
        self._programs: dict[str, Any] = {}
        self._trains_others: dict[Any, bool] = {}
        self.predict_step = self.execution.program(predict)
        self.with_rest = self.execution.program(lambda state: with_rest(state), donate=0)
        # A function of this trainer alone: a program lives as long as the function it is made of.
        self._evaluation_params = self.execution.program(
            lambda opt_state, params: evaluation_params(opt_state, params)
        )
        self.evaluation_watch = self.make_watch()

    state: TrainState | None
    not_loaded: DistaffError | None

    def program(self, name: str, function: Callable[..., Any]) -> Any:
        """Returns the program of a name, made of a pure function where there is none yet."""
        if name not in self._programs:
            self._programs[name] = self.execution.program(function)
        return self._programs[name]

    def show(self, line: str) -> None:
        """Shows a line, and writes it into the log file of a run."""
        _log.info("%s", line)
        self.display.print(line)

    def ready_state(self) -> TrainState:
        """Returns the state.

        Raises:
            StateError: there is none yet.
        """
        if self.state is None:
            raise StateError(
                "The model has no parameters yet. Call train_model first, give the trainer an "
                "example_batch, or use load_from_checkpoint."
            )
        return self.state

    def evaluation_state(self) -> TrainState:
        """Returns the state with the parameters to evaluate with; see `optim.evaluation_params`.

        Raises:
            StateError: there is none yet.
        """
        state = self.ready_state()
        kind = jax.tree.structure(state.opt_state)
        if kind not in self._trains_others:
            self._trains_others[kind] = has_evaluation_params(state.opt_state)
        if not self._trains_others[kind]:
            return state
        return state.replace(params=self._evaluation_params(state.opt_state, state.params))

    def restore(self, store: Store, step: int, members: Iterable[str]) -> None:
        """Replaces members of the state by those of a checkpoint.

        Args:
            store: where the checkpoint is.
            step: which one.
            members: names of the state's members. Without `opt_state` among them, `params` are
                those that the optimizer evaluates with.

        Raises:
            CheckpointError: it cannot be read, or is of another model.
        """
        state, info = self.ready_state(), store.info(step)
        saved_as = {name: name for name in members}
        if {"params", "opt_state"} & saved_as.keys() == {"params"} and info.get(EVALUATION_PARAMS):
            saved_as["params"] = EVALUATION_PARAMS
        wanted = {saved: getattr(state, name) for name, saved in saved_as.items()}
        loaded = like(store.load(step, wanted), wanted)
        self.state = state.replace(**{name: loaded[saved] for name, saved in saved_as.items()})
        self.step, self.epoch = step, _epoch(info)

    @contextmanager
    def chunks(
        self,
        loader: Any,
        name: str,
        may_pad: MayPad,
        tracker: Callable[..., Iterator[Any]],
        interruptible: Callable[[Iterator[Chunk]], Iterator[Chunk]] = iter,
    ) -> Generator[Iterator[Chunk]]:
        """Yields one pass over a loader to evaluate on, in chunks, with its progress shown.

        Args:
            loader: any iterable of batches.
            name: of the loader, for errors and the display.
            may_pad: see `Evaluator.may_pad`.
            tracker: shows the progress.
            interruptible: ends the pass when the run is asked to end.
        """
        made = loader if self.feeds.has_view(loader) else as_loader(loader, name=name)
        self.evaluation_watch.expect(loader, num_shapes=num_shapes(made))
        with self.feeds.one_pass(made, name) as view:
            capacity, length = self.capacity, num_batches(view)
            # Gathered rows would be a program of its own for each data set.
            feed = self.feeds.of(view, name=name, resident=False)
            total = None if length is None else -(-length // capacity)
            with closing(feed.repeated(ChunkSize(capacity, capacity), even=may_pad)) as chunks:
                yield tracker(interruptible(chunks), description=name, total=total)

    def make_watch(self) -> Watch:
        """Returns what watches the programs of a run, or those of evaluations."""
        recompile = "ignore" if self._options.debug else self._options.recompile
        return Watch(recompile, step=lambda: self.step, say=lambda text: self.display.print(text))


def _epoch(info: Mapping[str, Any]) -> int:
    return int(info.get("epoch", 0))

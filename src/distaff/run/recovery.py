"""Recovery: what is done about a bad step, why it was bad, and how a run continues without it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing, contextmanager
from itertools import count, islice, takewhile
from typing import Any

import jax

from distaff.checkpoint import CheckpointStore, MemoryStore, Store, forget_after
from distaff.core.typing import Batch
from distaff.data import Loader, Stream, num_batches, sources
from distaff.errors import CheckpointError, ConfigError, NonFiniteError
from distaff.execution.dispatch.packed_metrics import BadStep
from distaff.execution.feed.chunk import SINGLE, Chunk
from distaff.execution.feed.skipped import SkippedBatches, num_drawn, relapses, skipped_batches
from distaff.run.checkpointer import Checkpointer
from distaff.run.diagnosis import OUT_OF_RANGE, diagnose, replay
from distaff.run.events import BadNumbers
from distaff.run.recorder import Recorder
from distaff.run.run_state import EpochProgress
from distaff.run.supervision.supervisor import Supervisor
from distaff.run.supervision.watchdog import COMPILING
from distaff.step.guard import RecoveryOptions

_MAX_ORIGIN_BYTES = 2**26
_MAX_REPLAY_SECONDS = 60.0

_REACH, _MAX_TRIES = 8, 3
"""How many batches on each side of a bad step are left out: what it fails of is often the batches
before it. Twice as many each time that the next bad step comes soon after, which it may this often:
then the batches are not to blame."""

_MIN_REST = 4
"""On each side, at most a quarter of an epoch is left out."""

_REMEDY = (
    "Lower the learning rate, clip gradients (OptimizerConfig(clip_norm=1.0)), or look at the data."
)

_INDEX_REMEDY = (
    "Look at the batch for indices, such as labels or tokens, that are negative or too large. "
    "ctx.check_indices in the loss names the batch that holds one."
)


class Recovery:
    """What is done about a bad step: it is explained, and rolled back from where that is asked for.

    Args:
        recorder: of the run.
        checkpointer: saves and restores the run.
        supervisor: knows whether there is time to explain.
        options: of the run.
    """

    def __init__(
        self,
        recorder: Recorder,
        checkpointer: Checkpointer,
        supervisor: Supervisor,
        options: RecoveryOptions,
    ) -> None:
        self._recorder, self._checkpointer = recorder, checkpointer
        self._supervisor, self._options = supervisor, options
        self._here, self._plan = recorder.workspace, recorder.plan

    def check(self) -> None:
        """Checks that the run can be rolled back, where that is asked for.

        Raises:
            ConfigError: it is, and the train loader cannot go back.
        """
        if self._rolls_back and _reads_streams(self._plan.train_loader):
            raise ConfigError(
                "A policy of 'rollback' needs a train loader that can go back to an earlier batch, "
                "and an iterable of your own cannot. Pass 'skip', or a loader with get_state and "
                "set_state, such as data.ArrayLoader."
            )

    @property
    def _rolls_back(self) -> bool:
        return "rollback" in (self._options.on_bad_numbers, self._options.on_loss_spike)

    def keep_origin(self) -> None:
        """Keeps the state before the first step, until there is a checkpoint to go back to.

        To explain a bad step, memory will do, where it is little.
        """
        facts = self._checkpointer.facts({}, None)
        if self._rolls_back:  # it outlives saves by time
            self._checkpointer.save({**facts, "provisional": False})
            return
        self._checkpointer.origin = MemoryStore()
        arrays = self._here.ready_state().arrays()
        size = sum(x.nbytes for x in jax.tree.leaves(arrays))
        if self._here.explains and size <= _MAX_ORIGIN_BYTES:
            self._checkpointer.origin.save(self._here.step, arrays, facts)

    def raise_if_nothing_is_left(self) -> None:
        """Raises an error for an epoch of which no batch was trained on.

        Raises:
            NonFiniteError: all of its batches were left out.
        """
        state = self._recorder.state
        if not state.in_epoch.steps and state.skipped:
            raise NonFiniteError(
                f"Of epoch {self._here.epoch} all batches were left out, because of bad steps: "
                f"nothing is left to train on. {self._kept()} {_REMEDY}"
            )

    @contextmanager
    def explaining(self) -> Generator[None]:
        """Turns a bad step that is not rolled back into an error that says all of it."""
        try:
            yield
        except BadNumbers as found:
            raise self._failure(found, self._account(found)) from None

    def recover(self, found: BadNumbers) -> None:
        """Rolls back to before a bad step and skips the batches around it, if asked to.

        Raises:
            NonFiniteError: it is not, or the run has been rolled back too often.
        """
        store, here, recorder = self._checkpointer.store, self._here, self._recorder
        epoch, batch = here.epoch, recorder.batch_of(found.bad)
        tries = relapses(recorder.state.skipped, epoch, batch, self._length)
        begun = here.step - recorder.state.in_epoch.steps
        first = max(begun, found.bad.step - 1 - self._reach(tries))
        store.wait()
        account, good = self._account(found), _newest(store, first)
        refusal = self._too_often(good, tries)
        if self._policy(found.bad) != "rollback" or good is None or refusal:
            raise self._failure(found, account + refusal) from None
        try:
            self._go_back(store, good, epoch, batch, self._reach(tries))
        except CheckpointError as error:
            raise self._failure(found, f"{account}It cannot go back: {error} ") from error
        gone = recorder.state.skipped[-1]
        recorder.show(
            f"{account}Back to step {here.step}; batches {gone.start + 1} to {gone.stop} of epoch "
            f"{epoch} are left out."
        )

    def _policy(self, bad: BadStep) -> str:
        return self._options.on_loss_spike if bad.is_spike else self._options.on_bad_numbers

    def _account(self, found: BadNumbers) -> str:
        """Returns what is known of a bad step; the state is then the last good one."""
        batch, epoch = self._recorder.batch_of(found.bad), self._here.epoch
        return f"{found} It was batch {batch + 1} of epoch {epoch}. {self._explained(found.bad)}"

    def _failure(self, found: BadNumbers, account: str) -> NonFiniteError:
        policy, option = self._policy(found.bad), "on_bad_numbers"
        option = "on_loss_spike" if found.bad.is_spike else option
        further = {
            "skip": f" max_skips={self._options.max_skips} bad steps before it have been skipped.",
            "raise": f" Or go on: {option}='skip' or 'rollback'.",
        }
        remedy = _INDEX_REMEDY if OUT_OF_RANGE in account else _REMEDY
        return NonFiniteError(f"{account}{self._kept()} {remedy}{further.get(policy, '')}")

    @property
    def _length(self) -> int | None:
        return self._plan.steps_per_epoch or num_batches(self._plan.train_loader)

    def _reach(self, tries: int) -> int:
        """Returns how many batches are left out on each side of a bad one."""
        reach, length = _REACH * 2**tries, self._length
        return reach if length is None else min(reach, max(1, length // _MIN_REST))

    def _too_often(self, step: int | None, tries: int) -> str:
        """Returns a sentence on why the run does not go back once more, if so."""
        if len(self._recorder.state.skipped) >= self._options.max_skips:
            return f"The run has gone back {len(self._recorder.state.skipped)} times: max_skips. "
        if tries >= _MAX_TRIES:
            return f"The run has gone back to step {step} {tries} times: it is not the batches. "
        return ""

    def _go_back(self, store: Store, step: int, epoch: int, batch: int, reach: int) -> None:
        """Goes back to a checkpoint, which from then on names what is left out around a batch."""
        recorder, here, checkpointer = self._recorder, self._here, self._checkpointer
        before = recorder.state.skipped
        here.feeds.settle(self._plan.train_loader)
        saved = checkpointer.restore(store, step, val=not self._validates_on_streams)
        if isinstance(store, CheckpointStore) and step != store.latest():
            forget_after(store, step)
        start = max(0, batch - reach)
        progress = recorder.state.in_epoch
        if progress.epoch == epoch:  # what is in the state cannot be left out of it
            start = max(start, num_drawn(progress.steps, skipped_batches(before, epoch)))
        gone = SkippedBatches(epoch, start, batch + reach + 1, step)
        recorder.update(skipped=(*before, gone), step=here.step, epoch=here.epoch)
        metrics, is_best = ({}, None) if saved is None else (saved.metrics, saved.is_best)
        facts = checkpointer.facts(metrics, is_best)
        checkpointer.save({**facts, "provisional": store.info(step)["provisional"]})

    @property
    def _validates_on_streams(self) -> bool:
        return any(map(_reads_streams, self._plan.val_loaders.values()))

    def _kept(self) -> str:
        good = self._checkpointer.store.latest()
        if good is None:
            return "There is no checkpoint yet."
        place = self._recorder.recording.path or "memory"
        return f"The last good checkpoint is of step {good}, in {place}."

    def _explained(self, bad: BadStep) -> str:
        """Runs steps again from the last good state, and returns what was found, if anything."""
        store = (
            self._checkpointer.store
            if self._checkpointer.store.steps()
            else self._checkpointer.origin
        )
        step = store.latest()
        if bad.is_spike or not self._here.explains or step is None or jax.process_count() > 1:
            return ""
        self._recorder.show(
            f"step {bad.step} is bad; running again from step {step} to find out why"
        )
        limit = _MAX_REPLAY_SECONDS
        try:
            info = store.info(step)
            self._here.restore(store, step, self._checkpointer.saved_members(info))
            self._here.feeds.settle(self._plan.train_loader)
            self._plan.train_loader.set_state(info["loader"])
            with closing(self._batches(info)) as batches:
                some = islice(batches, bad.step - step)
                first = replay(
                    self._here.plain_step, self._here.ready_state(), some, max_seconds=limit
                )
            if first is None:
                return "Run again one by one, no step was bad, or there was no time. "
            found = diagnose(self._here.plain_step, first.state, first.batch, max_seconds=limit)
        except Exception as error:  # such as a loader that cannot go back, in its own words
            return f"Why is not known: {error} "
        number = step + first.index + 1
        place = f"In step {number}: " if number != bad.step else ""
        return "" if found is None else f"{place}{found.text} "

    def _batches(self, info: dict[str, Any]) -> Generator[Batch]:
        """Yields the batches after a checkpoint, one by one; the loader stands there."""
        loader, tally = (
            self._plan.train_loader,
            EpochProgress.from_json(info["tally"], self._recorder.dispatcher.layout),
        )
        is_over = info["is_best"] is not None or tally.is_trained
        done = 0 if is_over else tally.steps
        for epoch in count(tally.epoch + is_over):
            without = skipped_batches(self._recorder.state.skipped, epoch)
            chunks = self._here.feeds.of(loader, name="train").epoch(
                lambda: SINGLE,
                self._plan.steps_per_epoch,
                done=num_drawn(done, without),
                without=without,
            )
            with closing(chunks):
                for chunk in takewhile(self._has_time, chunks):
                    yield chunk.source.batch(0)
            done = 0

    def _has_time(self, chunk: Chunk) -> bool:
        """Whether a step may be run again: not where the run shall end."""
        self._supervisor.beat("a step that is run again", self._here.step, COMPILING)
        return not self._supervisor.is_ending


def _newest(store: Store, step: int) -> int | None:
    """Returns the newest checkpoint up to a step; the newest of all where there is none.

    One that was saved by the clock may lie within the batches that are left out: where there is an
    older one, the clock then has no part in which batches these are.
    """
    return max((each for each in store.steps() if each <= step), default=store.latest())


def _reads_streams(loader: Loader) -> bool:
    return any(isinstance(source, Stream) for source in sources(loader))

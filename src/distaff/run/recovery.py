"""Recovery from bad steps: finds the cause, rolls back, and skips the batches around them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing, contextmanager
from itertools import count, islice, takewhile
from typing import Any

import jax

from distaff.checkpoint import CheckpointStore, MemoryStore, Store, forget_after
from distaff.core.typing import Batch
from distaff.data import Loader, Stream, sources
from distaff.errors import CheckpointError, ConfigError, NonFiniteError
from distaff.execution.dispatch.packed_metrics import BadStep
from distaff.execution.feed.chunk import SINGLE, Chunk
from distaff.execution.feed.skipped import SkippedBatches, num_drawn, relapses, skipped_batches
from distaff.run.checkpointer import Checkpointer
from distaff.run.diagnosis import OUT_OF_RANGE, diagnose, replay
from distaff.run.events import BadNumbers
from distaff.run.recorder import Recorder
from distaff.run.run_state import EpochProgress, ends_epoch
from distaff.run.supervision.supervisor import Supervisor
from distaff.run.supervision.watchdog import COMPILING
from distaff.step.guard import RecoveryOptions

_MAX_ORIGIN_BYTES = 2**26
_MAX_REPLAY_SECONDS = 60.0

_REACH, _MAX_TRIES = 8, 3
"""Batches skipped on each side of a bad one, as its cause often lies before it; and how often the
next bad step may follow soon after. The number is doubled each time; after the last one, the
batches are not to blame."""

_MIN_REST = 4
"""On each side, at most a quarter of an epoch is skipped."""

_REMEDY = (
    "Lower the learning rate, clip gradients (OptimizerConfig(clip_norm=1.0)), or check the data."
)

_INDEX_REMEDY = (
    "Check the batch for indices, such as labels or tokens, that are negative or too large. "
    "Call ctx.check_indices in the loss to find the batch."
)


class Recovery:
    """Diagnoses bad steps, and rolls the run back if configured.

    Args:
        recorder: the progress of the run.
        checkpointer: saves and restores the run.
        supervisor: stops the diagnosis if the run is interrupted.
        options: the policies for bad steps.
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
        self._workspace, self._plan = recorder.workspace, recorder.plan

    def check(self) -> None:
        """Raises ConfigError if a policy is "rollback" and the train loader cannot rewind."""
        if self._rolls_back and _reads_streams(self._plan.train_loader):
            raise ConfigError(
                "The 'rollback' policy needs a train loader that can return to an earlier batch; a "
                "plain iterable cannot. Use 'skip', or a loader with get_state and set_state, such "
                "as data.ArrayLoader."
            )

    @property
    def _rolls_back(self) -> bool:
        return "rollback" in (self._options.on_bad_numbers, self._options.on_loss_spike)

    def save_origin(self) -> None:
        """Saves the state before the first step: on disk to roll back to, else in memory.

        The copy in memory serves the diagnosis of a bad step; a large state is not copied.
        """
        facts = self._checkpointer.facts({}, None)
        if self._rolls_back:  # timed saves must not replace it
            self._checkpointer.save({**facts, "provisional": False})
            return
        self._checkpointer.origin = MemoryStore()
        arrays = self._workspace.ready_state().arrays()
        size = sum(x.nbytes for x in jax.tree.leaves(arrays))
        if self._workspace.explains and size <= _MAX_ORIGIN_BYTES:
            self._checkpointer.origin.save(self._workspace.step, arrays, facts)

    def raise_if_all_skipped(self) -> None:
        """Raises NonFiniteError if all batches of the epoch were skipped."""
        state = self._recorder.state
        if not state.in_epoch.steps and state.skipped:
            raise NonFiniteError(
                f"All batches of epoch {self._workspace.epoch} were skipped because of bad steps. "
                f"{self._last_good()} {_REMEDY}"
            )

    @contextmanager
    def explaining(self) -> Generator[None]:
        """Turns an unrecovered `BadNumbers` into an error with its diagnosis."""
        try:
            yield
        except BadNumbers as found:
            raise self._error(found, self._describe(found)) from None

    def recover(self, found: BadNumbers) -> None:
        """Rolls back to before a bad step, and skips the batches around it.

        Raises:
            NonFiniteError: the policy is not "rollback", or the run was rolled back too often.
        """
        store, workspace, recorder = self._checkpointer.store, self._workspace, self._recorder
        epoch, batch = workspace.epoch, recorder.batch_of(found.bad)
        tries = relapses(recorder.state.skipped, epoch, batch, self._epoch_length)
        begun = workspace.step - recorder.state.in_epoch.steps
        first = max(begun, found.bad.step - 1 - self._reach(tries))
        store.wait()
        description, good = self._describe(found), _newest(store, first)
        limit = self._limit_text(good, tries)
        if self._policy(found.bad) != "rollback" or good is None or limit:
            raise self._error(found, description + limit) from None
        try:
            self._roll_back(store, good, epoch, batch, self._reach(tries))
        except CheckpointError as error:
            raise self._error(found, f"{description}The rollback failed: {error} ") from error
        skipped = recorder.state.skipped[-1]
        recorder.show(
            f"{description}Rolled back to step {workspace.step}; skipping batches "
            f"{skipped.start + 1} to {skipped.stop} of epoch {epoch}."
        )

    def _policy(self, bad: BadStep) -> str:
        return self._options.on_loss_spike if bad.is_spike else self._options.on_bad_numbers

    def _describe(self, found: BadNumbers) -> str:
        """Describes a bad step and its cause; may restore the last good state."""
        batch, epoch = self._recorder.batch_of(found.bad), self._workspace.epoch
        return f"{found} It was batch {batch + 1} of epoch {epoch}. {self._explain(found.bad)}"

    def _error(self, found: BadNumbers, description: str) -> NonFiniteError:
        policy, option = self._policy(found.bad), "on_bad_numbers"
        option = "on_loss_spike" if found.bad.is_spike else option
        further = {
            "skip": f" max_skips={self._options.max_skips} bad steps before it were skipped.",
            "raise": f" To continue in such a case, set {option}='skip' or 'rollback'.",
        }
        remedy = _INDEX_REMEDY if OUT_OF_RANGE in description else _REMEDY
        return NonFiniteError(f"{description}{self._last_good()} {remedy}{further.get(policy, '')}")

    @property
    def _epoch_length(self) -> int | None:
        return self._plan.epoch_length

    def _reach(self, tries: int) -> int:
        """Returns how many batches to skip on each side of a bad one."""
        reach, length = _REACH * 2**tries, self._epoch_length
        return reach if length is None else min(reach, max(1, length // _MIN_REST))

    def _limit_text(self, step: int | None, tries: int) -> str:
        """Returns the reason not to roll back again; empty if it may."""
        number, most = len(self._recorder.state.skipped), self._options.max_skips
        if number >= most:
            return f"The run was already rolled back {number} times (max_skips={most}). "
        if tries >= _MAX_TRIES:
            times = f"{tries} times to step {step}"
            return f"The run was rolled back {times}, so the batches are not the cause. "
        return ""

    def _roll_back(self, store: Store, step: int, epoch: int, batch: int, reach: int) -> None:
        """Restores a checkpoint, and saves it again with the batches to skip."""
        recorder, workspace, checkpointer = self._recorder, self._workspace, self._checkpointer
        before = recorder.state.skipped
        workspace.feeds.settle(self._plan.train_loader)
        val = not any(map(_reads_streams, self._plan.val_loaders.values()))
        saved = checkpointer.restore(store, step, val=val)
        if isinstance(store, CheckpointStore) and step != store.latest():
            forget_after(store, step)
        start = max(0, batch - reach)
        progress = recorder.state.in_epoch
        if progress.epoch == epoch:  # the state was already trained on these
            start = max(start, num_drawn(progress.steps, skipped_batches(before, epoch)))
        skipped = SkippedBatches(epoch, start, batch + reach + 1, step)
        recorder.update(skipped=(*before, skipped), step=workspace.step, epoch=workspace.epoch)
        metrics, is_best = ({}, None) if saved is None else (saved.metrics, saved.is_best)
        facts = checkpointer.facts(metrics, is_best)
        checkpointer.save({**facts, "provisional": store.info(step)["provisional"]})

    def _last_good(self) -> str:
        good = self._checkpointer.store.latest()
        if good is None:
            return "There is no checkpoint yet."
        place = self._recorder.recording.path or "memory"
        return f"The last good checkpoint is of step {good}, in {place}."

    def _explain(self, bad: BadStep) -> str:
        """Repeats the steps since the last good state to find the cause of a bad one."""
        checkpointer, workspace = self._checkpointer, self._workspace
        store = checkpointer.store if checkpointer.store.steps() else checkpointer.origin
        step = store.latest()
        if bad.is_spike or not workspace.explains or step is None or jax.process_count() > 1:
            return ""
        self._recorder.show(
            f"step {bad.step} is bad; repeating the steps after step {step} to find the cause"
        )
        limit = _MAX_REPLAY_SECONDS
        try:
            info = store.info(step)
            workspace.restore(store, step, checkpointer.saved_members(info))
            workspace.feeds.settle(self._plan.train_loader)
            self._plan.train_loader.set_state(info["loader"])
            with closing(self._batches(info)) as batches:
                some = islice(batches, bad.step - step)
                plain_step = workspace.plain_step
                state = workspace.execution.placement.fetched(workspace.ready_state())
                first = replay(plain_step, state, some, max_seconds=limit)
            if first is None:
                return "Repeated one at a time, no step was bad, or the time was too short. "
            found = diagnose(plain_step, first.state, first.batch, max_seconds=limit)
        except Exception as error:  # such as a loader that cannot rewind
            return f"The cause is unknown: {error} "
        number = step + first.index + 1
        place = f"In step {number}: " if number != bad.step else ""
        return "" if found is None else f"{place}{found.text} "

    def _batches(self, info: dict[str, Any]) -> Generator[Batch]:
        """Yields the batches after a checkpoint, which the loader is at."""
        loader, layout = self._plan.train_loader, self._recorder.dispatcher.layout
        progress = EpochProgress.from_json(info["tally"], layout)
        is_over = ends_epoch(info) or progress.is_trained
        done = 0 if is_over else progress.steps
        for epoch in count(progress.epoch + is_over):
            skipped = skipped_batches(self._recorder.state.skipped, epoch)
            chunks = self._workspace.feeds.of(loader, name="train").epoch(
                lambda: SINGLE,
                self._plan.steps_of(epoch),
                done=num_drawn(done, skipped),
                without=skipped,
            )
            with closing(chunks):
                for chunk in takewhile(self._has_time, chunks):
                    yield chunk.source.batch(0)
            done = 0

    def _has_time(self, chunk: Chunk) -> bool:
        """Whether to repeat a step: not if the run is interrupted."""
        self._supervisor.beat("a repeated step", self._workspace.step, COMPILING)
        return not self._supervisor.is_ending


def _newest(store: Store, step: int) -> int | None:
    """Returns the newest checkpoint up to a step; the newest of all if each is later.

    Preferring an older checkpoint makes the skipped batches independent of timed saves, which may
    lie among them.
    """
    return max((each for each in store.steps() if each <= step), default=store.latest())


def _reads_streams(loader: Loader) -> bool:
    return any(isinstance(source, Stream) for source in sources(loader))

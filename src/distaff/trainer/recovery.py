"""Recovery: what a bad step leads to, why it was bad, and how a run goes on without it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager
from itertools import count, islice, takewhile
from typing import Any

import jax

from distaff.callbacks import StepInfo
from distaff.checkpoint import CheckpointStore, MemoryStore, Store, forget_after
from distaff.core.typing import Batch
from distaff.data import Loader, Stream, num_batches, sources
from distaff.errors import CheckpointError, ConfigError, NonFiniteError
from distaff.execution.dispatch.packed_metrics import BadStep
from distaff.execution.feed.chunk import SINGLE, Chunk
from distaff.execution.feed.skipped import Stretch, left_out, num_drawn, relapses
from distaff.run.diagnosis import OUT_OF_RANGE, diagnose, replay
from distaff.run.events import BadNumbers, Plan
from distaff.run.supervision.watchdog import COMPILING
from distaff.run.tally import Tally
from distaff.step.normalise import StepFn
from distaff.trainer.warm_start import WarmStart

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


class Recovering(WarmStart):
    """A training that knows what to do with a bad step."""

    explains = True
    """Whether to look for where a bad number came from; a search has no time for it."""

    _plain_step: StepFn

    def begin(self, plan: Plan) -> None:
        """Counts a new run.

        Raises:
            ConfigError: it is to go back where its loader cannot.
        """
        if self._goes_back and _reads_streams(plan.train_loader):
            raise ConfigError(
                "A policy of 'rollback' needs a train loader that can go back to an earlier batch, "
                "and an iterable of your own cannot. Pass 'skip', or a loader with get_state and "
                "set_state, such as data.ArrayLoader."
            )
        super().begin(plan)
        self.feeds.make_room(2 + len(plan.val_loaders))

    @property
    def _goes_back(self) -> bool:
        return "rollback" in (self.config.on_bad_numbers, self.config.on_loss_spike)

    def go_on(self) -> StepInfo | None:
        """Goes to where a resumed run was saved; keeps the state that a new one begins with."""
        saved = super().go_on()
        if self.recording.found is None:
            self._keep_origin()
        return saved

    def save(self, facts: Mapping[str, Any]) -> None:
        """Saves the run, as `Resumable` does; from here on it can go back there."""
        super().save(facts)
        self.origin = MemoryStore()

    def _keep_origin(self) -> None:
        """Keeps the state before the first step, until there is a checkpoint to go back to.

        To explain a bad step, memory will do, where it is little.
        """
        if self._goes_back:
            self.save({**self.facts({}, None), "provisional": False})  # outlives saves by time
            return
        self.origin = MemoryStore()
        arrays = self.ready_state().arrays()
        if self.explains and sum(x.nbytes for x in jax.tree.leaves(arrays)) <= _MAX_ORIGIN_BYTES:
            self.origin.save(self.step, arrays, self.facts({}, None))

    def end_steps(self) -> dict[str, Any]:
        """Ends the steps of an epoch.

        Raises:
            NonFiniteError: all of its batches were left out.
        """
        if not self.tally.steps and self.left_out:
            raise NonFiniteError(
                f"Of epoch {self.epoch} all batches were left out, because of bad steps: nothing "
                f"is left to train on. {self._kept()} {_REMEDY}"
            )
        return super().end_steps()

    @contextmanager
    def explaining(self) -> Generator[None]:
        """Turns a bad step that nobody goes back from into an error that says all of it."""
        try:
            yield
        except BadNumbers as found:
            raise self._failure(found, self._account(found)) from None

    def recover(self, found: BadNumbers) -> None:
        """Goes back to before a bad step and on without the batches around it, if asked to.

        Raises:
            NonFiniteError: it is not, or the run has gone back too often.
        """
        store, epoch, batch = self.recording.store, self.epoch, self._batch_of(found.bad)
        tries = relapses(self.left_out, epoch, batch, self._length)
        first = max(self.step - self.tally.steps, found.bad.step - 1 - self._reach(tries))
        store.wait()
        account, good = self._account(found), _newest(store, first)
        refusal = self._too_often(good, tries)
        if self._policy(found.bad) != "rollback" or good is None or refusal:
            raise self._failure(found, account + refusal) from None
        try:
            self._go_back(store, good, epoch, batch, self._reach(tries))
        except CheckpointError as error:
            raise self._failure(found, f"{account}It cannot go back: {error} ") from error
        gone = self.left_out[-1]
        self.show(
            f"{account}Back to step {self.step}; batches {gone.start + 1} to {gone.stop} of epoch "
            f"{epoch} are left out."
        )

    def _policy(self, bad: BadStep) -> str:
        return self.config.on_loss_spike if bad.is_spike else self.config.on_bad_numbers

    def _account(self, found: BadNumbers) -> str:
        """Returns what is known of a bad step; the state is then the last good one."""
        batch, epoch = self._batch_of(found.bad), self.epoch
        return f"{found} It was batch {batch + 1} of epoch {epoch}. {self._explained(found.bad)}"

    def _failure(self, found: BadNumbers, account: str) -> NonFiniteError:
        policy, option = self._policy(found.bad), "on_bad_numbers"
        option = "on_loss_spike" if found.bad.is_spike else option
        further = {
            "skip": f" max_skips={self.config.max_skips} bad steps before it have been skipped.",
            "raise": f" Or go on: {option}='skip' or 'rollback'.",
        }
        remedy = _INDEX_REMEDY if OUT_OF_RANGE in account else _REMEDY
        return NonFiniteError(f"{account}{self._kept()} {remedy}{further.get(policy, '')}")

    def _batch_of(self, bad: BadStep) -> int:
        """Returns which batch of the epoch a step was trained on, counted from 0."""
        step_of_epoch = bad.step - (self.step - self.tally.steps)
        return num_drawn(step_of_epoch, left_out(self.left_out, self.epoch)) - 1

    @property
    def _length(self) -> int | None:
        return self.plan.steps_per_epoch or num_batches(self.plan.train_loader)

    def _reach(self, tries: int) -> int:
        """Returns how many batches are left out on each side of a bad one."""
        reach, length = _REACH * 2**tries, self._length
        return reach if length is None else min(reach, max(1, length // _MIN_REST))

    def _too_often(self, step: int | None, tries: int) -> str:
        """Returns a sentence on why the run does not go back once more, if so."""
        if len(self.left_out) >= self.config.max_skips:
            return f"The run has gone back {len(self.left_out)} times: max_skips. "
        if tries >= _MAX_TRIES:
            return f"The run has gone back to step {step} {tries} times: it is not the batches. "
        return ""

    def _go_back(self, store: Store, step: int, epoch: int, batch: int, reach: int) -> None:
        """Goes back to a checkpoint, which from then on names what is left out around a batch."""
        before = self.left_out
        self.feeds.settle(self.plan.train_loader)
        saved = self.put_back(store, step, val=not self._validates_on_streams)
        if isinstance(store, CheckpointStore) and step != store.latest():
            forget_after(store, step)
        start = max(0, batch - reach)
        if self.tally.epoch == epoch:  # what is in the state cannot be left out of it
            start = max(start, num_drawn(self.tally.steps, left_out(before, epoch)))
        self.left_out = [*before, Stretch(epoch, start, batch + reach + 1, step)]
        self.reached = self.step, self.epoch
        facts = self.facts({}, None) if saved is None else self.facts(saved.metrics, saved.is_best)
        self.save({**facts, "provisional": store.info(step)["provisional"]})

    @property
    def _validates_on_streams(self) -> bool:
        return any(map(_reads_streams, self.plan.val_loaders.values()))

    def _kept(self) -> str:
        good = self.recording.store.latest()
        if good is None:
            return "There is no checkpoint yet."
        return f"The last good checkpoint is of step {good}, in {self.recording.path or 'memory'}."

    def _explained(self, bad: BadStep) -> str:
        """Runs steps again from the last good state, and returns what was found, if anything."""
        store = self.recording.store if self.recording.store.steps() else self.origin
        step = store.latest()
        if bad.is_spike or not self.explains or step is None or jax.process_count() > 1:
            return ""
        self.show(f"step {bad.step} is bad; running again from step {step} to find out why")
        limit = _MAX_REPLAY_SECONDS
        try:
            info = store.info(step)
            self.restore(store, step, self.saved_members(info))
            self.feeds.settle(self.plan.train_loader)
            self.plan.train_loader.set_state(info["loader"])
            with closing(self._batches(info)) as batches:
                some = islice(batches, bad.step - step)
                first = replay(self._plain_step, self.ready_state(), some, max_seconds=limit)
            if first is None:
                return "Run again one by one, no step was bad, or there was no time. "
            found = diagnose(self._plain_step, first.state, first.batch, max_seconds=limit)
        except Exception as error:  # such as a loader that cannot go back, in its own words
            return f"Why is not known: {error} "
        number = step + first.index + 1
        place = f"In step {number}: " if number != bad.step else ""
        return "" if found is None else f"{place}{found.text} "

    def _batches(self, info: dict[str, Any]) -> Generator[Batch]:
        """Yields the batches after a checkpoint, one by one; the loader stands there."""
        loader, tally = self.plan.train_loader, Tally.from_json(info["tally"], self._steps.columns)
        is_over = info["is_best"] is not None or tally.is_trained
        done = 0 if is_over else tally.steps
        for epoch in count(tally.epoch + is_over):
            without = left_out(self.left_out, epoch)
            chunks = self.feeds.of(loader, name="train").epoch(
                lambda: SINGLE,
                self.plan.steps_per_epoch,
                done=num_drawn(done, without),
                without=without,
            )
            with closing(chunks):
                for chunk in takewhile(self._has_time, chunks):
                    yield chunk.source.batch(0)
            done = 0

    def _has_time(self, chunk: Chunk) -> bool:
        """Whether a step may be run again: not where the run shall end."""
        self.watchdog.beat("a step that is run again", self.step, COMPILING)
        return self.interruption.reason is None


def _newest(store: Store, step: int) -> int | None:
    """Returns the newest checkpoint up to a step; the newest of all where there is none.

    One that was saved by the clock may lie within the batches that are left out: where there is an
    older one, the clock then has no part in which batches these are.
    """
    return max((each for each in store.steps() if each <= step), default=store.latest())


def _reads_streams(loader: Loader) -> bool:
    return any(isinstance(source, Stream) for source in sources(loader))

"""Finished: what a run has led to, or one before it whose program died later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from distaff.data import unlimited
from distaff.errors import MetricError
from distaff.metrics import as_json, as_numbers
from distaff.metrics.named import Named
from distaff.run.identity.candidates import Candidate
from distaff.run.ranking import best_json
from distaff.run.report import Report
from distaff.run.result import TrainResult
from distaff.trainer.resumable import Resumable, explained


class Reloadable(Resumable):
    """A training with a result, which may be that of a run that is finished already."""

    def save_metrics(self, name: str, metrics: Mapping[str, Any]) -> None:
        """Writes metrics to `metrics/<name>.json` in the run directory.

        Raises:
            StateError: nothing has been trained yet.
        """
        self.check_run()
        self.recording.save_metrics(name, as_json(metrics))

    def result(self, metrics: dict[str, Any]) -> TrainResult:
        """Returns how a run that came to its end stands."""
        return TrainResult(
            status=self._status(),
            reason=self.interrupted_by or self.stop_reason or self._nothing_left(),
            step=self.reached[0],
            epoch=self.reached[1],
            metrics=Named(metrics),
            best=self.best,
            path=self.recording.path,
            first_step=self.first_step,
        )

    def _nothing_left(self) -> str:
        is_done = self.recording.found is not None and self.reached[0] == self.first_step
        return f"nothing was left to train after step {self.first_step}" if is_done else ""

    def _status(self) -> str:
        if self.interrupted_by:
            return "interrupted"
        return self.callbacks.stop_status if self.stop_reason else "finished"

    def outcome(self) -> dict[str, Any]:
        """Returns what `result` does, as it is written into the run's status."""
        facts = self.result(self.last_metrics)._asdict()
        del facts["path"], facts["first_step"]
        with suppress(MetricError):  # which has ended the run
            facts["metrics"] = as_json(self.last_metrics)
        best = None if self.best is None else best_json(self.best)
        report, form = self.report or Report(self.ledger.read()), self.forms.facts()
        return {**facts, "best": best, "steps_per_call": form, "throughput": report.facts()}

    def load_finished(self, done: Candidate, made: Iterable[tuple[Any, Any]]) -> TrainResult:
        """Takes the result of a run that is finished, and leaves all as if it had just been made.

        Args:
            done: the run; the recording is that of it.
            made: what was given as loaders, and the loaders it became: those of the user's own go
                to where the run has left them.

        Raises:
            CheckpointError: its checkpoints cannot be read.
        """
        store, status = self.recording.store, done.status
        step = store.latest()
        assert step is not None  # or it would not be one to load
        info = store.info(step)
        self.has_run = True
        own = [loader for given, loader in made if given is loader]
        with explained(step):
            self.bring_back(info, store)
            if any(unlimited(self.plan.train_loader) is each for each in own):
                self.go_to(info["loader"], self.plan.train_loader, "train")
            if info["val_loader"] is not None and self.plan.val_loaders:
                self.go_to_validation(info["val_loader"], own)
        self.load_model()
        self.reached = self.first_step, _ = int(status["step"]), int(status["epoch"])
        self.last_metrics = dict(as_numbers(status["metrics"]))
        self.show(f"{done.path} is finished: it is loaded, and nothing is trained")
        reason = str(status.get("reason") or "") or "finished before: nothing was trained"
        return self.result(self.last_metrics)._replace(status=str(status["status"]), reason=reason)

    def show_result(self, metrics: Mapping[str, Any]) -> None:
        """Shows the metrics of a finished run; says so where nothing was trained in this call."""
        super().show_result(metrics)
        if self.reached[0] == self.first_step:
            self.show(f"nothing was left to train after step {self.first_step}")

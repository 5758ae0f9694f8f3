"""Finished: a run whose result is taken, because the program that made it died later."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from distaff.candidates import Candidate
from distaff.data import unlimited
from distaff.metrics import as_numbers
from distaff.resume import Resumable, explained
from distaff.trainer_config import TrainResult


class Reloadable(Resumable):
    """A training that takes a finished run for its own."""

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

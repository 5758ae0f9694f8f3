"""Warm start: a training whose model begins with the weights of another one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distaff.callbacks import StepInfo
from distaff.checkpoint.weights import as_init_from, export_weights, loaded
from distaff.checkpoint.weights.names import as_variables
from distaff.core.typing import Batch
from distaff.errors import DistaffError
from distaff.models import LoraModel
from distaff.run.directory.recording import DirectoryRecording
from distaff.trainer.finished import Reloadable


class WarmStart(Reloadable):
    """A training that may begin with weights from elsewhere, and gives its own away.

    Args:
        model: see `Training`.
        init_from: a run directory, a checkpoint folder, a `.safetensors` file or a tree of arrays,
            which has a value for each array of the model and no other; or an `InitFrom`, which says
            what differs. A run that is gone on with has the weights of its checkpoint.
        **options: see `Training`.
    """

    _not_loaded: DistaffError | None = None
    _origin_text: str = ""

    def __init__(self, model: Any, *, init_from: Any = None, **options: Any) -> None:
        super().__init__(model, **options)
        self.init_from = as_init_from(init_from)

    def init_model(self, example_batch: Batch) -> None:
        """Makes the state before training, with the weights of `init_from`.

        Raises:
            CheckpointError: they cannot be read, or do not fit the model.
        """
        super().init_model(example_batch)
        self._not_loaded, self._origin_text = None, ""
        if self.init_from is None:
            return
        state = self.ready_state()
        try:
            variables, self._origin_text = loaded(self.model, as_variables(state), self.init_from)
        except DistaffError as error:
            if not self._may_go_on():
                raise
            self._not_loaded = error
            self.show(f"the weights are to come from a checkpoint, since init_from fails: {error}")
            return
        self.state = state.replace(**variables._asdict())

    def go_on(self) -> StepInfo | None:
        """Goes to where a resumed run was saved, or says what a new one begins with.

        Raises:
            CheckpointError: it is a new one, and the weights of `init_from` could not be loaded.
        """
        not_loaded, self._not_loaded = self._not_loaded, None
        if self.recording.found is None and not self.step:
            if not_loaded is not None:
                raise not_loaded
            if self._origin_text:
                self.show(self._origin_text)
        return super().go_on()

    def record(self, **arguments: Any) -> dict[str, Any]:
        """Returns what determines this run, as strict JSON."""
        if self.init_from is not None:
            arguments["init_from"] = self.init_from.record()
        return super().record(**arguments)

    def export_weights(
        self, path: str | Path, *, only: str | Sequence[str] = "*", merge: bool = True
    ) -> Path:
        """Writes the model's arrays as a safetensors file; see `distaff.export_weights`.

        Args:
            path: the file, which ends in `.safetensors`.
            only: shell patterns for the names to write.
            merge: whether the kernels of a `Lora` get their updates, so that the file is of an
                ordinary model; else its base and the updates are apart:
                `only=("*/lora_a", "*/lora_b")` for the updates alone.

        Returns:
            The absolute path of the file.

        Raises:
            StateError: the model has no parameters yet.
            CheckpointError: the file cannot be written.
        """
        variables = as_variables(self.evaluation_state())
        if merge and isinstance(self.model, LoraModel):
            variables = self.model.merged(variables)
        return export_weights(path, variables, only=only)

    def _may_go_on(self) -> bool:
        """Whether there may be a run to go on with, whose checkpoint then has the weights."""
        recording = self.recording
        return isinstance(recording, DirectoryRecording) and recording.may_resume

"""Checks: what a run looks at before it begins, so that bad input has a name."""

from __future__ import annotations

import warnings
from typing import Any

from distaff.data import Chunk, Loader, One, first_batch, num_examples, num_shapes
from distaff.data.inspection import narrowed, not_finite
from distaff.errors import BatchError
from distaff.evaluate import Evaluator
from distaff.metrics import compute
from distaff.recovery import Recovering
from distaff.typing import Batch


class Checked(Recovering):
    """A training that looks at the first batch of each loader before it begins."""

    _evaluator: Evaluator

    def check_batch(self, batch: Batch, name: str) -> None:
        """Looks at the first batch of a loader, once and on the host. Override it to check more.

        Args:
            batch: a pytree of arrays `[batch, ...]`.
            name: of the loader: `"train"`, `"val"` or `"test"`.

        Raises:
            BatchError: an input is NaN or infinite, under `on_bad_input="raise"`. A run that goes
                on after bad steps (`on_bad_numbers`) takes them as they come.
        """
        cast = narrowed(batch, name)
        if cast and self.config.on_bad_input != "ignore":
            warnings.warn(cast, stacklevel=2)
        if name != "train" or self.config.on_bad_numbers == "raise":
            self.object_to(not_finite(batch, name))

    def object_to(self, complaint: str) -> None:
        """Tells of bad input, in the way that `on_bad_input` asks for.

        Args:
            complaint: what is wrong; empty where nothing is.

        Raises:
            BatchError: something is, under `on_bad_input="raise"`.
        """
        if complaint and self.config.on_bad_input == "raise":
            raise BatchError(f"{complaint} Or pass on_bad_input='warn', which goes on with it.")
        if complaint and self.config.on_bad_input == "warn":
            warnings.warn(complaint, stacklevel=2)

    def check_evaluation(self, loader: Loader, name: str) -> dict[str, Any]:
        """Traces the evaluation of a loader's first batch, looks at that batch, and evaluates it.

        What is evaluated before the training, unless `check_validation=False`, is one batch of a
        validation loader. Neither the state, nor a random number, nor the loader's place changes.

        Returns:
            The metrics it gives, as shapes.

        Raises:
            DistaffError: any bad input, by its kind.
        """
        batch = first_batch(loader, name=name)
        shapes = self._evaluator.shapes(self.evaluation_state(), batch)
        self.check_batch(batch, name)
        if name != "test" and self.config.check_validation:
            self.evaluation_watch.expect(loader, num_shapes=num_shapes(loader))
            chunk = Chunk(1, num_examples(batch), One(batch))
            compute(self._evaluator(self.evaluation_state(), [chunk]))
        return shapes

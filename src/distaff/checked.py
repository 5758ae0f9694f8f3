"""Checks: what a run looks at before it begins, so that bad input has a name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distaff.data import Chunk, Loader, One, first_batch, num_examples, num_shapes
from distaff.data.inspection import leaf_names, narrowed, not_finite
from distaff.errors import BatchError, ConfigError, nearest
from distaff.evaluate import Evaluator
from distaff.metrics import Metric, compute, results
from distaff.metrics.limits import Breach, first_breach
from distaff.recovery import Recovering
from distaff.rows import BadStep
from distaff.typing import Batch
from distaff.warn import warn


class Checked(Recovering):
    """A training that looks at the first batch of each loader before it begins."""

    _evaluator: Evaluator

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._told: set[tuple[str, str]] = set()

    def check_batch(self, batch: Batch, name: str) -> None:
        """Looks at the first batch of a loader, once and on the host. Override it to check more.

        Args:
            batch: a pytree of arrays `[batch, ...]`.
            name: of the loader: `"train"`, `"val"` or `"test"`.

        Raises:
            BatchError: an input is NaN or infinite, under `on_bad_input="raise"`. A run that goes
                on after bad steps (`on_bad_numbers`) takes them as they come.
        """
        known = leaf_names(batch)
        for leaf in self.config.nan_ok if name == "train" else ():
            if leaf not in known:
                raise ConfigError(
                    f"nan_ok names leaves of the batches; {leaf!r} is not one. "
                    f"{nearest(leaf, known)}"
                )
        cast = narrowed(batch, name)
        if cast and self.config.on_bad_input != "ignore":
            warn(cast, stacklevel=2)
        if name != "train" or self.config.on_bad_numbers == "raise":
            weight = self.sample_weight(batch)
            missing = {"nan_ok": self.config.nan_ok, "weight": weight}
            self.object_to(not_finite(batch, name, **missing))

    def sample_weight(self, batch: Batch) -> Any:
        """Returns the weights of a batch that the loss uses, `[batch, ...]`; None without.

        What has the weight 0 may hold NaN. Override it where your loss uses weights.
        """
        return None

    def judge(self, bad: BadStep | None, breach: Breach | None = None) -> None:
        """Ends the work on an epoch where a bad step is not to be trained on; see `Training`.

        Raises:
            BatchError: a batch has a value out of range, under `on_bad_input="raise"`.
        """
        if breach is not None and (bad is None or breach.batch < bad.step):
            step = breach.batch + 1
            batch = self._batch_of(BadStep(step, is_spike=False)) + 1
            place = f"batch {batch} of epoch {self.epoch} of the train loader (step {step})"
            self._tell(breach, place, "train")
        super().judge(bad, breach)

    def check_values(self, metrics: Mapping[str, Metric], name: str) -> None:
        """Checks that no batch of an evaluation had a value out of range.

        Args:
            metrics: of the evaluation, on the host.
            name: of the loader.

        Raises:
            BatchError: one had, under `on_bad_input="raise"`.
        """
        breach = first_breach(metrics)
        if breach is not None:
            self._tell(breach, f"batch {breach.batch + 1} of the {name} loader", name)

    def _tell(self, breach: Breach, place: str, name: str) -> None:
        """Tells of a value out of range: of each rule and loader only once, where it is borne."""
        if self.config.on_bad_input == "raise" or (name, breach.rule) not in self._told:
            self._told.add((name, breach.rule))
            self.object_to(breach.text(place))

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
            warn(complaint, stacklevel=2)

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
            metrics = self._evaluator(self.evaluation_state(), [chunk])
            self.check_values(metrics, name)
            compute(metrics)
        return results(shapes)

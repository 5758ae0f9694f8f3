"""Observation of a pass: whether dropout and running statistics followed the mode."""

from __future__ import annotations

from typing import TypeVar

from distaff.core.warnings import warn
from distaff.errors import ConfigError, ModeWarning
from distaff.models.flags import NAMES_IN_WORDS

_REMEDY = (
    f"The mode is passed to an argument, or set in a field, with a name such as "
    f"{NAMES_IN_WORDS}. Rename yours, or pass it in the loss: "
    "ctx.apply(params, x, my_flag=ctx.train)."
)

M = TypeVar("M")


def observing(model: M, observed: Observed | None) -> M:
    """Returns a model whose passes are recorded, if its kind supports that."""
    method = getattr(model, "observing", None)
    return model if observed is None or method is None else method(observed)


class Observed:
    """A record of a model's layers in one pass whose mode the caller did not choose.

    Args:
        train: whether the pass is in training mode.
        model: name of the model, for messages.
    """

    def __init__(self, train: bool, model: str) -> None:
        self.train, self._model = train, model
        self._dropout: dict[str, bool] = {}
        self._statistics: dict[str, bool] = {}

    def dropout(self, name: str, *, is_on: bool) -> None:
        """Records whether a dropout layer drops values."""
        self._dropout[name] = is_on or self._dropout.get(name, False)

    def statistics(self, name: str, *, is_on: bool) -> None:
        """Records whether a layer updates its running statistics."""
        self._statistics[name] = is_on or self._statistics.get(name, False)

    def check(self) -> None:
        """Checks that the layers followed the mode, and warns if not.

        Raises:
            ConfigError: running statistics would change in evaluation.
        """
        if self.train:
            self._check_training()
            return
        moved = [name for name, is_on in self._statistics.items() if is_on]
        if moved:
            raise statistics_in_evaluation(self._model, moved)
        dropped = [name for name, is_on in self._dropout.items() if is_on]
        if dropped:
            _warn(
                f"In evaluation, dropout is on in {self._model}: in {_listed(dropped)}. Its "
                f"predictions are random. {_REMEDY}"
            )

    def _check_training(self) -> None:
        for what, layers in (
            ("dropout is off", self._dropout),
            ("running statistics do not change", self._statistics),
        ):
            if layers and not any(layers.values()):
                _warn(
                    f"In training, {what} in {self._model}: in {_listed(list(layers))}. {_REMEDY} "
                    "If that part is frozen on purpose, ignore this ModeWarning."
                )


def statistics_in_evaluation(model: str, layers: list[str]) -> ConfigError:
    """Returns the error for running statistics that would change in evaluation."""
    where = f" in {_listed(layers)}" if layers else ""
    return ConfigError(
        f"{model} updates running statistics (batch_stats) in evaluation{where}, so an example's "
        "output would depend on the rest of its batch, as with "
        f"BatchNorm(use_running_average=False). Write use_running_average=not train. {_REMEDY}"
    )


def _warn(text: str) -> None:
    warn(text, ModeWarning, stacklevel=2)


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) if name else "the model itself" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")

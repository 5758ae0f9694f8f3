"""What a pass of a model made of its mode: whether dropout dropped, whether statistics moved."""

from __future__ import annotations

from typing import TypeVar

from distaff.core.warnings import warn
from distaff.errors import ConfigError, ModeWarning
from distaff.models.flags import NAMES_IN_WORDS

_REMEDY = (
    f"A model is told whether it trains by an argument, or a field, of a name such as "
    f"{NAMES_IN_WORDS}. Rename the one that it has, or pass it yourself in the loss: "
    "ctx.apply(params, x, my_flag=ctx.train)."
)


M = TypeVar("M")


def observing(model: M, observed: Observed | None) -> M:
    """Returns a model whose passes are noted, where its kind can do so."""
    method = getattr(model, "observing", None)
    return model if observed is None or method is None else method(observed)


class Observed:
    """What the layers of a model did in one pass whose mode was not chosen by the caller.

    Args:
        train: whether the pass was to train.
        model: the model's name, for the message.
    """

    def __init__(self, train: bool, model: str) -> None:
        self.train, self._model = train, model
        self._dropout: dict[str, bool] = {}
        self._statistics: dict[str, bool] = {}

    def dropout(self, name: str, *, is_on: bool) -> None:
        """Notes a dropout layer, and whether it dropped."""
        self._dropout[name] = is_on or self._dropout.get(name, False)

    def statistics(self, name: str, *, is_on: bool) -> None:
        """Notes a layer with running statistics, and whether it moved them."""
        self._statistics[name] = is_on or self._statistics.get(name, False)

    def check(self) -> None:
        """Objects to layers that did not follow the mode.

        Raises:
            ConfigError: running statistics were to move in evaluation.
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
                f"predictions are random, then. {_REMEDY}"
            )

    def _check_training(self) -> None:
        for what, found in (
            ("no dropout layer drops", self._dropout),
            ("no running statistics move", self._statistics),
        ):
            if found and not any(found.values()):
                _warn(
                    f"In training, {what} in {self._model}: it is always in evaluation, in "
                    f"{_listed(list(found))}. {_REMEDY} For a frozen part this is right: ignore "
                    "the ModeWarning."
                )


def statistics_in_evaluation(model: str, layers: list[str]) -> ConfigError:
    """Returns the error for running statistics that would move in evaluation."""
    where = f" in {_listed(layers)}" if layers else ""
    return ConfigError(
        f"Running statistics (batch_stats) move in training only, and {model} moves them in "
        f"evaluation{where}: an example's output would depend on the rest of its batch, as with "
        f"BatchNorm(use_running_average=False). Write use_running_average=not train. {_REMEDY}"
    )


def _warn(text: str) -> None:
    warn(text, ModeWarning, stacklevel=2)


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) if name else "the model itself" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")

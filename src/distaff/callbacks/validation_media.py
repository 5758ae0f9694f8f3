"""Callbacks that log samples of the model, or histograms of its weights, after validations."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from distaff.callbacks.callback import Callback, StepInfo
from distaff.core.config.checks import whole
from distaff.errors import ConfigError, StateError, leaf_name
from distaff.loggers.disk import explained, replace
from distaff.loggers.many import ManyLoggers
from distaff.optim.transforms.masks import check_patterns

_NUM_BINS = 64


class _EveryValidation(Callback):
    """Counts validations; the count is saved with each checkpoint."""

    def __init__(self, every: int) -> None:
        self.every = whole("every", every)
        self.num_seen = 0

    def _is_due(self) -> bool:
        """Counts a validation; returns whether it is an n-th one."""
        self.num_seen += 1
        return self.num_seen % self.every == 0

    def get_state(self) -> dict[str, Any]:
        """Returns the number of validations so far."""
        return {"num_seen": self.num_seen}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores the state that `get_state` returned."""
        self.num_seen = int(state["num_seen"])


class Samples(_EveryValidation):
    """Logs images, figures and texts that a function makes after validations.

    They are files of the run directory, and records of each logger that supports them.

    Args:
        make: called with the `StepInfo` of the validation; returns what to log by name: an image
            (`[height, width]` or `[height, width, channels]`, uint8 or float in [0, 1]), a
            matplotlib Figure, or a string. `info.state.params` are the weights.
        every: log after every n-th validation.

    Raises:
        ConfigError: an argument is out of its range.
    """

    def __init__(self, make: Callable[[StepInfo], Mapping[str, Any]], *, every: int = 1) -> None:
        super().__init__(every)
        if not callable(make):
            raise ConfigError(
                f"make of Samples is a function of a StepInfo; got {make!r}. Write "
                "Samples(lambda info: {'sample': ...})."
            )
        self.make = make

    def on_validation_end(self, info: StepInfo) -> None:
        """Calls `make` if it is due, and logs each value according to its type.

        Raises:
            ConfigError: `make` does not return values by name, or no logger supports one of them.
            BatchError: an array is not an image.
        """
        if not self._is_due():
            return
        made, logger = self.make(info), _logger(self, info)
        if not isinstance(made, Mapping):
            raise ConfigError(
                f"make of Samples returns what to log by name, such as {{'sample': image}}; got "
                f"{type(made).__name__}."
            )
        for name, value in made.items():
            kind = _kind(value)
            if not _supports(logger, f"log_{kind}"):
                raise ConfigError(
                    f"No logger of this run supports what Samples made as {name!r} ({kind}). Set "
                    "root, so that it becomes a file, or add a logger such as 'tensorboard'."
                )
            getattr(logger, f"log_{kind}")(name, value, step=info.step)


class WeightHistograms(_EveryValidation):
    """Logs a histogram of each parameter after validations, as `params/<path>`.

    If no logger of the run supports histograms, they are written to
    `histograms/params_<step>.json` of the run directory: for each parameter, `counts` `[64]` and
    `edges` `[65]`. Values that are not finite are left out.

    Args:
        patterns: shell patterns for the paths of parameters, such as `("encoder/*", "head/*")`.
        every: log after every n-th validation; each copies the parameters to the host.

    Raises:
        ConfigError: an argument is out of its range; in a run, a pattern matches no parameter.
    """

    def __init__(self, patterns: str | tuple[str, ...] = "*", *, every: int = 1) -> None:
        super().__init__(every)
        self.patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        if not self.patterns or not all(isinstance(each, str) for each in self.patterns):
            raise ConfigError(
                "patterns of WeightHistograms are shell patterns for the paths of parameters, such "
                f"as ('encoder/*', 'head/*'); got {patterns!r}."
            )

    def on_training_start(self, info: StepInfo) -> None:
        """Checks that the histograms have a place, and that each pattern matches.

        Raises:
            ConfigError: they have none, or a pattern matches no parameter.
        """
        if not _supports(_logger(self, info), "log_histogram") and info.path is None:
            raise ConfigError(
                "WeightHistograms needs a logger that supports histograms, or a run directory. Set "
                "root, or add a logger such as distaff.loggers.TensorBoardLogger(directory)."
            )
        if info.state is not None:
            check_patterns({"WeightHistograms": self.patterns}, info.state.params)

    def on_validation_end(self, info: StepInfo) -> None:
        """Logs the histograms if they are due, or writes them to a file.

        Raises:
            RunDirectoryError: the file cannot be written.
        """
        if not self._is_due():
            return
        arrays, logger = self._arrays(info), _logger(self, info)
        if _supports(logger, "log_histogram"):
            for name, values in arrays.items():
                logger.log_histogram(name, values, step=info.step)
        elif info.path is not None:
            path = info.path / "histograms" / f"params_{info.step}.json"
            content = {name: _histogram(values) for name, values in arrays.items()}
            with explained(path):
                replace(path, json.dumps(content, allow_nan=False).encode())

    def _arrays(self, info: StepInfo) -> dict[str, np.ndarray]:
        """Returns the finite values of the parameters whose path matches, float64 `[n]`."""
        params = None if info.state is None else info.state.params
        found = {}
        for path, leaf in jax.tree.leaves_with_path(params):
            name = leaf_name(path)
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns):
                values = np.asarray(jax.device_get(leaf)).astype(np.float64).ravel()
                found[f"params/{name}"] = values[np.isfinite(values)]
        return {name: values for name, values in found.items() if values.size}


def _histogram(values: np.ndarray) -> dict[str, Any]:
    counts, edges = np.histogram(values, _NUM_BINS)
    return {"counts": counts.tolist(), "edges": edges.tolist()}


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    return "figure" if hasattr(value, "savefig") else "image"


def _supports(logger: ManyLoggers, method: str) -> bool:
    return any(hasattr(each, method) for each in logger.loggers)


def _logger(callback: Callback, info: StepInfo) -> ManyLoggers:
    if info.logger is None:
        raise StateError(
            f"{type(callback).__name__} needs the logger of a run. Pass it to a trainer: "
            f"callbacks=[{type(callback).__name__}(...)]."
        )
    return info.logger

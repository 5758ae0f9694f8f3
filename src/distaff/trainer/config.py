"""`TrainerConfig`, the options of every trainer, collected from the parts that use them."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, TypeVar

from distaff.core.config.options import described, descriptions, integer, option
from distaff.core.config.other_frameworks import OPTIONS, remedy
from distaff.errors import ConfigError
from distaff.execution.device_memory import FitOptions
from distaff.models import PrecisionOptions, RematOptions
from distaff.run.display.protocol import DisplayOptions
from distaff.run.run import RunOptions
from distaff.step.accumulation.micro_batches import MicroBatchOptions

C = TypeVar("C", bound="TrainerConfig")


@described
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig(
    DisplayOptions, PrecisionOptions, RematOptions, MicroBatchOptions, FitOptions, RunOptions
):
    """The options of every trainer. Subclass it to add your own.

    Raises:
        ConfigError: an option is out of range.
    """

    seed: int = option(
        42,
        "Seed of the parameters, dropout, and all other random numbers of the model.",
        check=integer,
    )
    keep_optimizer: bool = option(
        True,
        """Whether a second call of `train_model` keeps the optimizer state, such as Adam's moments.
        False resets it. The schedule of an `OptimizerConfig`, or of a function of the number of
        steps, restarts with each call.""",
    )


def make_config(cls: type[C], options: dict[str, Any], owner: type) -> C:
    """Creates a trainer's options from keyword arguments.

    Args:
        cls: the class of the options.
        options: their values.
        owner: the class of the trainer, whose other arguments are suggested, too.

    Raises:
        ConfigError: an option is unknown; the message suggests the nearest one.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    for name in options:
        if name not in known:
            known += [
                parameter.name
                for base in owner.__mro__
                for parameter in inspect.signature(base.__init__).parameters.values()
                if parameter.kind is parameter.KEYWORD_ONLY
            ]
            raise ConfigError(
                f"{owner.__name__} has no option {name!r}. {remedy(name, known, OPTIONS)}"
            )
    return cls(**options)


def with_descriptions(doc: str | None) -> str:
    """Returns a class docstring with a description of every option of `**options`."""
    listed = descriptions(TrainerConfig)
    return inspect.cleandoc(doc or "").replace("by name:\n", f"by name:\n\n{listed}\n")

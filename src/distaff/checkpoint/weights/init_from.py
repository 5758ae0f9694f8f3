"""InitFrom: where a model's first weights come from, and under which names."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

from distaff.checkpoint.compare import leaf_forms
from distaff.checkpoint.weights.names import as_patterns, named
from distaff.core.config.options import check_choice
from distaff.core.typing import PyTree
from distaff.errors import ConfigError


@dataclass(frozen=True, eq=False)  # arrays have no truth value that could say whether two are equal
class InitFrom:
    r"""Weights that a model begins with, instead of its own initial ones.

    By default each array of the model is found, and each array of the source is used. Shapes must
    be the same. So must dtypes; only a float becomes a float of another width, as in
    `float32 -> bfloat16`, to the nearest value and never from a finite number to infinity.

    Args:
        source: a run directory (its best checkpoint is taken, else its newest), one checkpoint
            folder, a `.safetensors` file; or arrays: a tree of parameters, a dict with the key
            `params` and other collections beside it, a `TrainState`.
        rename: regular expressions and what to put for each match, as in `re.sub`, applied one
            after the other to the names of the source: `{r"^encoder/": "backbone/"}`;
            `{r"\.": "/"}` for a file with dotted names.
        only: shell patterns, as of parameter groups, for the arrays of the model that are loaded:
            `"backbone/*"`. All others keep their initial values, and what the source has for them
            is left there.
        missing: what an array leads to that the source lacks: "error", or "keep" for the model's
            initial value.
        unused: what an array of the source leads to that the model lacks: "error" or "ignore".

    Raises:
        ConfigError: an option is out of its range.
    """

    source: str | os.PathLike[str] | PyTree
    _: KW_ONLY
    rename: Mapping[str, str] = field(default_factory=dict)
    only: str | Sequence[str] = "*"
    missing: Literal["error", "keep"] = "error"
    unused: Literal["error", "ignore"] = "error"

    def __post_init__(self) -> None:
        """Refuses what cannot be used."""
        check_choice("missing", self.missing, Literal["error", "keep"])
        check_choice("unused", self.unused, Literal["error", "ignore"])
        object.__setattr__(self, "only", as_patterns(self.only))
        if not isinstance(self.rename, Mapping):
            raise ConfigError(
                "rename is a dict of regular expressions and their replacements, such as "
                f"{{'^encoder/': 'backbone/'}}; got {self.rename!r}."
            )
        for pattern in self.rename:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ConfigError(
                    f"rename has regular expressions as keys; {pattern!r} is none: {error}."
                ) from error

    @property
    def path(self) -> str | None:
        """The source, if it is a path."""
        return os.fspath(self.source) if isinstance(self.source, str | os.PathLike) else None

    def renamed(self, name: str) -> str:
        """Returns the name that an array of the source has in the model.

        Raises:
            ConfigError: a replacement refers to a group that its pattern lacks.
        """
        for pattern, replacement in self.rename.items():
            try:
                name = re.sub(pattern, replacement, name)
            except (re.error, IndexError, TypeError) as error:
                raise ConfigError(
                    f"The replacement of a rename is a template of re.sub; {replacement!r} for "
                    f"{pattern!r} is none: {error}."
                ) from error
        return name

    def record(self) -> dict[str, Any]:
        """Returns what a run's record says of it: of arrays their forms."""
        return {
            "source": leaf_forms(named(self.source)) if self.path is None else self.path,
            "rename": dict(self.rename),
            "only": list(self.only),
            "missing": self.missing,
            "unused": self.unused,
        }


def as_init_from(source: Any) -> InitFrom | None:
    """Returns what a user passes as `init_from` in its full form; None stays None."""
    return source if source is None or isinstance(source, InitFrom) else InitFrom(source)

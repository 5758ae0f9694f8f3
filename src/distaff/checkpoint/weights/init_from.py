"""InitFrom: the source of a model's initial weights, and how its names map to the model's."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

from distaff.checkpoint.compare import leaf_forms
from distaff.checkpoint.weights.names import as_patterns, named
from distaff.checkpoint.weights.pytorch import TorchRules, as_rules
from distaff.core.config.options import check_choice
from distaff.core.typing import PyTree
from distaff.errors import ConfigError


@dataclass(frozen=True, eq=False)  # arrays have no truth value that could say whether two are equal
class InitFrom:
    r"""Weights to start from, instead of the model's own initialization.

    By default, model and source must have the same arrays. Shapes must be equal, and dtypes too,
    except that a float may change its width, as in `float32 -> bfloat16`: values are rounded to
    nearest, and finite values must stay finite.

    Args:
        source: a run directory (its best checkpoint, else its newest), a checkpoint folder, a
            `.safetensors` file; or arrays: a tree of parameters, a dict with the key `params` and
            other collections, or a `TrainState`.
        rename: regular expressions and their replacements, as in `re.sub`, applied in order to the
            names of the source: `{r"^encoder/": "backbone/"}`; `{r"\.": "/"}` for dotted names.
        only: shell patterns, as in parameter groups, for the arrays of the model to load:
            `"backbone/*"`. All others keep their initial values.
        missing: what to do with arrays that the source lacks: "error", or "keep" the model's
            initial values.
        unused: what to do with arrays that the model lacks: "error" or "ignore".
        rules: "torch" for a file of a PyTorch model: names and layouts are converted. A
            `TorchRules` has names that differ, and replaces `rename`. None for no conversion.
        weights: which weights of a checkpoint: "raw", "ema" or "swa". By default those that
            `monitor` judged in its run.

    Raises:
        ConfigError: an option is invalid.
    """

    source: str | os.PathLike[str] | PyTree
    _: KW_ONLY
    rename: Mapping[str, str] = field(default_factory=dict)
    only: str | Sequence[str] = "*"
    missing: Literal["error", "keep"] = "error"
    unused: Literal["error", "ignore"] = "error"
    rules: Literal["torch"] | TorchRules | None = None
    weights: Literal["raw", "ema", "swa"] | None = None

    def __post_init__(self) -> None:
        check_choice("missing", self.missing, Literal["error", "keep"])
        check_choice("unused", self.unused, Literal["error", "ignore"])
        if self.weights is not None:
            check_choice("weights", self.weights, Literal["raw", "ema", "swa"])
        object.__setattr__(self, "only", as_patterns(self.only))
        if not isinstance(self.rename, Mapping):
            raise ConfigError(
                "rename is a dict of regular expressions and their replacements, such as "
                f"{{'^encoder/': 'backbone/'}}; got {self.rename!r}."
            )
        if as_rules(self.rules) is not None and self.rename:
            raise ConfigError(
                f"rules={self.rules!r} converts names itself; got rename={dict(self.rename)!r}, "
                "too. Write rules=distaff.TorchRules({'layers.{}.attn': 'Block_{}/Attention_0'})."
            )
        for pattern in self.rename:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ConfigError(
                    f"rename has regular expressions as keys; {pattern!r} is not one: {error}."
                ) from error

    @property
    def path(self) -> str | None:
        """The source, if it is a path."""
        return os.fspath(self.source) if isinstance(self.source, str | os.PathLike) else None

    def renamed(self, name: str) -> str:
        """Returns the name in the model of an array of the source.

        Raises:
            ConfigError: a replacement refers to a group that its pattern lacks.
        """
        for pattern, replacement in self.rename.items():
            try:
                name = re.sub(pattern, replacement, name)
            except (re.error, IndexError, TypeError) as error:
                raise ConfigError(
                    f"The values of rename are templates of re.sub; {replacement!r} for "
                    f"{pattern!r} is not one: {error}."
                ) from error
        return name

    def record(self) -> dict[str, Any]:
        """Returns the entry for the record of a run; arrays become shapes and dtypes."""
        rules = as_rules(self.rules)
        given: dict[str, Any] = {} if rules is None else {"rules": rules.record()}
        if self.weights is not None:
            given["weights"] = self.weights
        return {
            "source": leaf_forms(named(self.source)) if self.path is None else self.path,
            "rename": dict(self.rename),
            "only": list(self.only),
            "missing": self.missing,
            "unused": self.unused,
            **given,
        }


def as_init_from(source: Any) -> InitFrom | None:
    """Returns the `init_from` argument as an `InitFrom`; None stays None."""
    return source if source is None or isinstance(source, InitFrom) else InitFrom(source)

"""TorchRules: the names of a model's arrays in PyTorch."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

from distaff.checkpoint.weights.names import as_patterns
from distaff.errors import ConfigError, nearest

_NUMBER = "{}"


@dataclass(frozen=True)
class TorchRules:
    """How the tensors of a PyTorch model correspond to a model's arrays, in both directions.

    Leaf names and layouts follow from the kind of each layer: `weight` of PyTorch is the
    transposed `kernel` of a Flax layer, and `weight` in Equinox. See "Weights from PyTorch" in
    `docs/models.md` for the table.

    Args:
        names: paths in PyTorch, and in the model: `{"layers.{}.self_attn": "Block_{}/attention"}`.
            `{}` stands for a number. A path is a module, with all that it contains, or one array.
            If several match an array, the longest path in the model counts. A tuple of paths in
            the model splits a fused tensor along its outputs: `{"h.{}.attn.c_attn": ("h_{}/query",
            "h_{}/key", "h_{}/value")}`. The layers of an `nn.LSTM` called `lstm` are `lstm.l0`,
            `lstm.l1`, ... Layers stacked on a leading axis, as by `nn.scan`, have `{}` in PyTorch
            only: `{"layers.{}": "layers"}`. All other paths are equal on both sides, up to dots
            and slashes.
        inputs_first: shell patterns for tensors stored as `[in, out]`, where PyTorch has `[out,
            in]`: `"h.*.c_*.weight"` for the `Conv1D` of GPT-2.
        tied: tensors that are another one: `{"lm_head.weight": "wte.weight"}`. A file may hold one
            of the two, or both if they are equal; an export holds both.

    Raises:
        ConfigError: an option is invalid.
    """

    names: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    _: KW_ONLY
    inputs_first: str | Sequence[str] = ()
    tied: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs_first", as_patterns(self.inputs_first))
        for name in ("names", "tied"):
            value = getattr(self, name)
            if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
                raise ConfigError(f"{name} is a dict of names in PyTorch; got {value!r}.")
        if not all(isinstance(value, str) for value in self.tied.values()):
            raise ConfigError(f"tied is a dict of names of tensors; got {self.tied!r}.")
        templates = [each for key, value in self.names.items() for each in _templates(key, value)]
        by_model: dict[str, str] = {}
        for each in templates:
            if each.model in by_model:
                raise ConfigError(
                    f"names has two sources for {each.model!r}: {by_model[each.model]!r} and "
                    f"{each.torch!r}. Remove one; for a tensor that is another one, use "
                    "tied={'lm_head.weight': 'wte.weight'}."
                )
            by_model[each.model] = each.torch

    def place(self, path: str) -> TorchName:
        """Returns the place in PyTorch of a module or array of the model."""
        found = [each for each in self._all if each.pattern.match(path)]
        if not found:
            return TorchName(path.replace("/", "."), 0, False)
        best = max(found, key=lambda each: (len(_parts(each.model)), len(each.model)))
        match = best.pattern.match(path)
        assert match is not None
        rest = path[match.end() :].lstrip("/").replace("/", ".")
        start = best.torch
        for number in match.groups():
            start = start.replace(_NUMBER, number, 1)
        name = ".".join(part for part in (start, rest) if part)
        return TorchName(name, best.member, bool(best.model) and not rest)

    def check_used(self, paths: Iterable[str]) -> None:
        """Checks that each path of `names` is one of the model.

        Args:
            paths: paths of all arrays of the model.

        Raises:
            ConfigError: one of them matches nothing.
        """
        paths = list(paths)
        for each in self._all:
            if not any(each.pattern.match(path) for path in paths):
                modules = {path.rpartition("/")[0] or path for path in paths}
                raise ConfigError(
                    f"names={{{each.torch!r}: ...}} must lead to a path of the model; "
                    f"{each.model!r} matches none. {nearest(each.model, modules)}"
                )

    @functools.cached_property
    def _all(self) -> list[Template]:
        return [each for key, value in self.names.items() for each in _templates(key, value)]

    def record(self) -> dict[str, Any]:
        """Returns the options as JSON."""
        names = {k: v if isinstance(v, str) else list(v) for k, v in self.names.items()}
        return {"names": names, "inputs_first": list(self.inputs_first), "tied": dict(self.tied)}


class Template(NamedTuple):
    """One entry of `names`.

    Attributes:
        torch: path in PyTorch.
        model: path in the model.
        pattern: matches the start of a path in the model, up to the end of a part.
        member: number of this path in a fused tensor; 0 if it is not fused.
    """

    torch: str
    model: str
    pattern: re.Pattern[str]
    member: int


class TorchName(NamedTuple):
    """A place in PyTorch of a module or array.

    Attributes:
        name: dotted path, with `{}` for the number of a stacked layer.
        member: number in a fused tensor; 0 if it is not fused.
        is_named: whether `names` has exactly this path, and not only a start of it.
    """

    name: str
    member: int
    is_named: bool

    @property
    def is_stacked(self) -> bool:
        """Whether the arrays of several layers are one array of the model."""
        return _NUMBER in self.name


def as_rules(rules: Any) -> TorchRules | None:
    """Returns `TorchRules` for "torch", and None for None.

    Raises:
        ConfigError: `rules` is something else.
    """
    if rules is None or isinstance(rules, TorchRules):
        return rules
    if rules == "torch":
        return TorchRules()
    raise ConfigError(f"rules must be 'torch', distaff.TorchRules(...) or None; got {rules!r}.")


def _templates(torch: str, model: Any) -> list[Template]:
    models = (model,) if isinstance(model, str) else model
    if not isinstance(models, tuple) or not models or not all(isinstance(m, str) for m in models):
        raise ConfigError(
            f"The values of names are paths in the model, or tuples of them; got {model!r} for "
            f"{torch!r}."
        )
    for each in models:
        counts = torch.count(_NUMBER), each.count(_NUMBER)
        if counts[0] != counts[1] and counts != (1, 0):
            raise ConfigError(
                f"Both sides of names need the same number of {{}}; got {torch!r}: {each!r}."
            )
    return [Template(torch, m, _pattern(m), n) for n, m in enumerate(models)]


def _pattern(path: str) -> re.Pattern[str]:
    if not path:
        return re.compile("")
    literal = r"(\d+)".join(re.escape(part) for part in path.split(_NUMBER))
    return re.compile(rf"{literal}(?=/|$)")


def _parts(path: str) -> list[str]:
    return path.split("/") if path else []

"""Splits parameters by what their module calls their axes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from distaff.errors import ConfigError, nearest
from distaff.mesh.config import AxisRule, Spec, axes_of
from distaff.models.linen_collections import AxisNames

Names = Mapping[str, AxisNames | None]
"""The axis names of each parameter by path, such as `Dense_0/kernel`; None for one without."""

_REMEDY = (
    "A module names axes by nn.with_logical_partitioning or nn.with_partitioning in Flax Linen, "
    "and by nnx.with_partitioning in Flax NNX."
)


class AxisRules:
    """Decides how parameters are split, by the names of their axes.

    Args:
        rules: pairs of a name and mesh axes; earlier ones come first.
        names: the axis names of the parameters.
    """

    def __init__(self, rules: tuple[tuple[str, AxisRule], ...], names: Names) -> None:
        self._rules, self._names = rules, names
        self._specs = {path: each and self._spec(each) for path, each in names.items()}

    def spec(self, path: str) -> Spec | None:
        """Returns how an array is split; None without names.

        Args:
            path: path of a parameter, or of an array of the state that belongs to one, such as
                `opt_state/0/mu/Dense_0/kernel`.
        """
        parts = path.split("/")
        ends = ("/".join(parts[n:]) for n in range(len(parts)))  # the longest first
        return next((self._specs[end] for end in ends if end in self._specs), None)

    def check(self, paths: Iterable[str]) -> None:
        """Checks that names and rules belong together.

        Args:
            paths: paths of the parameters that are split by name, such as `Dense_0/kernel`.

        Raises:
            ConfigError: a rule is for a name that no axis has, or a name has no rule.
        """
        used = {name for names in self._names.values() for name in names or () if name}
        for name, _ in self._rules:
            if name not in used:
                hint = nearest(name, sorted(used)) if used else _REMEDY
                raise ConfigError(
                    f"MeshConfig.axis_rules has a rule for {name!r}, but no parameter has an axis "
                    f"of this name. {hint}"
                )
        known = {None, *(name for name, _ in self._rules)}
        named = [(name, path) for path in paths for name in self._names.get(path) or ()]
        missing = {name: path for name, path in reversed(named) if name not in known}
        if missing:
            shown = ", ".join(f"{name!r} (of {path!r})" for name, path in missing.items())
            raise ConfigError(
                f"MeshConfig.axis_rules has no rule for these axes of parameters: {shown}. Add a "
                "mesh axis for each, or None to leave it whole."
            )

    def _spec(self, names: AxisNames) -> Spec:
        spec: list[Any] = [None] * len(names)
        is_open, used = [True] * len(names), set[str]()
        for name, axes in self._rules:
            for axis, each in enumerate(names):
                if each == name and is_open[axis] and used.isdisjoint(axes_of(axes)):
                    spec[axis], is_open[axis] = axes, False
                    used.update(axes_of(axes))
        return tuple(spec)

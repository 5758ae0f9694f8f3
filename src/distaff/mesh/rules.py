"""Which mesh axes split each array of a state."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from distaff.core.typing import PyTree
from distaff.errors import ConfigError, leaf_name
from distaff.mesh.axis_names import AxisRules, Names
from distaff.mesh.config import MeshConfig, Spec, axes_of

_SMALL_BYTES = 2**20


class ShardingRules:
    """Decides how arrays are split, by their path, the names of their axes, and their shape.

    Optimizers and averages keep arrays under the paths of their parameters. A rule for a parameter
    therefore also holds for an array whose path ends with the parameter's, and an array without a
    rule is split by its shape alone.

    Args:
        config: the rules.
        mesh: the mesh.
        names: the axis names of the parameters, if the config has rules for them.
    """

    def __init__(
        self, config: MeshConfig, mesh: jax.sharding.Mesh, names: Names | None = None
    ) -> None:
        self._config, self.mesh = config, mesh
        self._by_name = AxisRules(config.axis_rules, names or {})
        self._sizes: Mapping[str, int] = dict(mesh.shape)

    def shardings(self, tree: PyTree) -> PyTree:
        """Returns the sharding of each array of a tree, or of their shapes."""

        def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
            return NamedSharding(self.mesh, self.spec(leaf_name(path), tuple(leaf.shape)))

        return jax.tree.map_with_path(one, tree)

    def spec(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """Returns the mesh axes of an array."""
        rule = self._rule(path)
        if rule is None or self._misfit(rule, shape) is not None:
            rule = self._automatic(shape)
        return self._normal(rule)

    def check(self, params: PyTree) -> None:
        """Checks the rules against the parameters.

        Raises:
            ConfigError: a rule matches no parameter or does not fit one, an axis name has no rule,
                or more bytes than `max_replicated` stay whole under `fsdp`.
        """
        named = jax.tree.leaves_with_path({"params": params})
        leaves = [(leaf_name(path), leaf) for path, leaf in named]
        self._check_names(leaves)
        for pattern, rule in self._config.rules:
            if not any(_matches(path, pattern) for path, _ in leaves):
                raise ConfigError(
                    f"The rule {pattern!r} of MeshConfig.rules matches no parameter. Parameters "
                    f"are {', '.join(repr(path) for path, _ in leaves[:8])}."
                )
            for path, leaf in leaves:
                misfit = self._misfit(rule, leaf.shape) if self._of_path(path) is rule else None
                if misfit:
                    raise ConfigError(
                        f"The rule {(pattern, rule)!r} of MeshConfig.rules does not fit {path!r} "
                        f"of shape {tuple(leaf.shape)}: {misfit}. Change the rule, or put one for "
                        "this parameter before it."
                    )
        if self._sizes["fsdp"] > 1:
            self._check_replicated(leaves)

    def _check_names(self, leaves: list[tuple[str, Any]]) -> None:
        named = [(path, leaf) for path, leaf in leaves if self._of_path(path) is None]
        self._by_name.check(path.removeprefix("params/") for path, _ in named)
        for path, leaf in named:
            rule = self._by_name.spec(path)
            misfit = None if rule is None else self._misfit(rule, leaf.shape)
            if misfit:
                raise ConfigError(
                    f"MeshConfig.axis_rules split {path!r} of shape {tuple(leaf.shape)} as "
                    f"{rule!r}, which does not fit: {misfit}. Change a rule, or give this "
                    "parameter one in MeshConfig.rules."
                )

    def _check_replicated(self, leaves: list[tuple[str, Any]]) -> None:
        whole = [(path, leaf) for path, leaf in leaves if not self._is_split(path, leaf.shape)]
        num_bytes = sum(leaf.nbytes for _, leaf in whole)
        share = num_bytes / max(1, sum(leaf.nbytes for _, leaf in leaves))
        if share > self._config.max_replicated and num_bytes >= _SMALL_BYTES:
            largest = sorted(whole, key=lambda each: -each[1].nbytes)[:5]
            shown = ", ".join(f"{path!r} {tuple(leaf.shape)}" for path, leaf in largest)
            raise ConfigError(
                f"{share:.0%} of the parameters' bytes cannot be split over fsdp="
                f"{self._sizes['fsdp']} devices, above max_replicated="
                f"{self._config.max_replicated:g}. The largest are {shown}. Use widths that the "
                "number of devices divides, lower min_size or raise max_replicated of the "
                "MeshConfig."
            )

    def _is_split(self, path: str, shape: tuple[int, ...]) -> bool:
        used = [axis for entry in self.spec(path, tuple(shape)) for axis in axes_of(entry)]
        return any(self._sizes[axis] > 1 for axis in used if axis != "data")

    def _rule(self, path: str) -> Spec | None:
        rule = self._of_path(path)
        return self._by_name.spec(path) if rule is None else rule

    def _of_path(self, path: str) -> Spec | None:
        for pattern, rule in self._config.rules:
            if _matches(path, pattern):
                return rule
        return None

    def _misfit(self, rule: Spec, shape: tuple[int, ...]) -> str | None:
        """Returns why a rule does not fit a shape; None if it fits."""
        if len(rule) > len(shape):
            return f"the rule is for {len(rule)} axes"
        for axis, entry in enumerate(rule):
            size = math.prod(self._sizes[name] for name in axes_of(entry))
            if shape[axis] % size:
                return f"{shape[axis]} does not divide by {size} devices"
        return None

    def _normal(self, spec: Spec) -> PartitionSpec:
        """Returns a spec as results of a program have it, so that none compiles again."""
        used = [tuple(axis for axis in axes_of(each) if self._sizes[axis] > 1) for each in spec]
        while used and not used[-1]:
            used.pop()
        return PartitionSpec(*(each[0] if len(each) == 1 else each or None for each in used))

    def _automatic(self, shape: tuple[int, ...]) -> Spec:
        spec: list[Any] = [None] * len(shape)
        if math.prod(shape) < self._config.min_size:
            return tuple(spec)
        tensor, fsdp = self._sizes["tensor"], self._sizes["fsdp"]
        if tensor > 1 and len(shape) > 1 and not shape[-1] % tensor:
            spec[-1] = "tensor"
        divisible = [n for n, x in enumerate(shape) if spec[n] is None and not x % fsdp]
        if fsdp > 1 and divisible:
            spec[max(divisible, key=lambda n: shape[n])] = "fsdp"
        return tuple(spec)


def _matches(path: str, pattern: str) -> bool:
    """Returns whether a path, or its end after a slash, matches a shell pattern."""
    return any(fnmatch.fnmatchcase(path, each) for each in (pattern, f"*/{pattern}"))

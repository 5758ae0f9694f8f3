"""LoRA: a model with frozen weights and a small trainable matrix product for each.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from distaff.core.config.checks import as_float, whole
from distaff.core.typing import Key, Params
from distaff.errors import ConfigError, leaf_name
from distaff.models import record
from distaff.models.adapter import LayerRow, Model, Variables, is_model
from distaff.models.observed import Observed, observing
from distaff.models.remat.model import reached
from distaff.models.remat.options import RematConfig

BASE = "lora_base"
"""The collection of the base's parameters, which are saved in checkpoints but not trained."""

_A, _B = "lora_a", "lora_b"
_STREAM = 0x6C6F7261


@dataclasses.dataclass(frozen=True)
class Lora:
    """A model to fine-tune by low-rank updates of its kernels; pass it as the model.

    The parameters are two matrices for each kernel `[in, out]`: `<path>/lora_a`, `[in, rank]`,
    normal with variance `1 / in`, and `<path>/lora_b`, `[rank, out]`, zero. The forward pass uses
    `kernel + alpha / rank * lora_a @ lora_b`. A kernel named `weight` is `[out, in]`, as in
    Equinox: `lora_a` is `[rank, in]`, `lora_b` `[out, rank]`, and `lora_b @ lora_a` is added. All
    other weights stay unchanged, bit for bit, in the collection `lora_base`, and need neither
    gradients nor optimizer state.

    Args:
        module: the model, of any kind that a trainer accepts.
        pattern: shell pattern for the paths of kernels, as in parameter groups: `"*/query/kernel"`,
            or `"*weight"` for Equinox. Matching arrays that do not have two axes stay unchanged.
        rank: rank of the updates.
        alpha: scale of the updates: they are multiplied by `alpha / rank`.

    Raises:
        ConfigError: an option is out of its range, or the model is a `Lora` itself.
    """

    module: Any
    pattern: str = "*kernel"
    _: dataclasses.KW_ONLY
    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        if isinstance(self.module, Lora):
            raise ConfigError(
                f"The module of a Lora must not be a Lora itself; got {self.module}. Export the "
                "merged weights of that one and start from them, or match all kernels by one "
                "pattern."
            )
        if not isinstance(self.pattern, str):
            raise ConfigError(f"pattern must be a str such as '*/kernel'; got {self.pattern!r}.")
        alpha = as_float(self.alpha)
        if not 0 < alpha < math.inf:
            raise ConfigError(f"alpha must be a finite positive number; got {self.alpha!r}.")
        object.__setattr__(self, "rank", whole("rank", self.rank))
        object.__setattr__(self, "alpha", alpha)


class LoraModel:
    """A `Lora` as pure functions.

    Args:
        inner: the base as a `Model`.
        lora: the options.
    """

    def __init__(self, inner: Model, lora: Lora) -> None:
        self.inner, self.module = inner, lora

    def observing(self, observed: Observed) -> LoraModel:
        """Returns this model with its passes recorded."""
        return LoraModel(observing(self.inner, observed), self.module)

    def rematerialized(self, remat: RematConfig) -> LoraModel:
        """Returns this model with modules of its base that are computed again."""
        return LoraModel(reached(self.inner, remat), self.module)

    @property
    def record(self) -> dict[str, Any]:
        """The options, and the record of the base."""
        names = [field.name for field in dataclasses.fields(self.module)]
        options = {name: getattr(self.module, name) for name in names}
        return {**options, "module": self.inner.record}

    @property
    def apply_fn(self) -> Callable[..., Any]:
        """The base's forward function, with merged kernels; it does not hold the base's arrays."""
        return self.light.forward

    @functools.cached_property
    def light(self) -> LoraModel:
        """The model around a base without the arrays of a ready-made module."""
        owner = getattr(self.inner.apply_fn, "__self__", None)
        if not is_model(owner) or owner is self.inner:
            return self
        copy = LoraModel(owner, dataclasses.replace(self.module, module=None))
        copy.__dict__["light"] = copy
        return copy

    def forward(self, variables: Mapping[str, Any], *inputs: Any, **kwargs: Any) -> Any:
        """Runs the base's own forward function, given collections that include `lora_base`."""
        rest = {name: tree for name, tree in variables.items() if name not in ("params", BASE)}
        merged = self.merged(Variables(variables["params"], collections={BASE: variables[BASE]}))
        return self.inner.apply_fn({"params": merged.params, **rest}, *inputs, **kwargs)

    def init(self, key: Key, *inputs: Any) -> Variables:
        """Creates the variables of the base, as the base alone would, and the matrices.

        Raises:
            ConfigError: the pattern matches no kernel.
        """
        base = self.inner.init(key, *inputs)
        return self.with_base(Variables(self._adapters(base.params, key)), base)

    def ready(self, key: Key) -> Variables | None:
        """Returns the variables of a ready-made base, and the matrices.

        The program that draws the matrices depends only on the shapes of the base.
        """
        base = self.inner.ready(key)
        if base is None:
            return None
        shapes = jax.eval_shape(lambda params: params, base.params)
        matrices = jax.jit(lambda key: self._adapters(shapes, key))(key)
        return self.with_base(Variables(matrices), base)

    def _adapters(self, params: Params, key: Key) -> Params:
        """Returns the matrices for the kernels among parameters, or their shapes."""
        stream = jax.random.fold_in(key, _STREAM)
        adapters: dict[tuple[str, ...], Any] = {}
        for path, leaf in jax.tree.leaves_with_path(params):
            name = leaf_name(path)
            is_kernel = leaf.ndim == 2 and jnp.issubdtype(leaf.dtype, jnp.floating)
            if is_kernel and fnmatch.fnmatchcase(name, self.module.pattern):
                own = jax.random.fold_in(stream, zlib.crc32(name.encode()))
                adapters[tuple(name.split("/"))] = self._pair(own, name, leaf)
        if not adapters:
            kernels = [leaf_name(p) for p, x in jax.tree.leaves_with_path(params) if x.ndim == 2]
            raise ConfigError(
                "The pattern of a Lora must match the path of a kernel [in, out], but "
                f"{self.module.pattern!r} matches none. It is a shell pattern, such as '*kernel', "
                f"or '*weight' for Equinox. Kernels: {kernels}."
            )
        return traverse_util.unflatten_dict(adapters)

    def apply(
        self, variables: Variables, *inputs: Any, train: bool, key: Key | None, **kwargs: Any
    ) -> tuple[Any, Variables]:
        """Runs the base's forward pass with merged kernels; see `Model.apply`."""
        merged = self.merged(variables)
        outputs, changed = self.inner.apply(merged, *inputs, train=train, key=key, **kwargs)
        base = changed._replace(params=self.base(variables).params)
        return outputs, self.with_base(variables, base)

    def bind(self, variables: Variables) -> Any:
        """Returns the base with merged kernels inside."""
        return self.inner.bind(self.merged(variables))

    def layers(self, key: Key, *inputs: Any) -> list[LayerRow]:
        """Lists the base's modules, with the matrices next to their kernels."""
        variables = jax.eval_shape(self.init, key, *inputs)
        pairs = {leaf_name(p): x for p, x in jax.tree.leaves_with_path(variables.params)}
        return [
            row._replace(variables=tuple(_with_pairs(row, pairs)))
            for row in self.inner.layers(key, *inputs)
        ]

    def base(self, variables: Variables) -> Variables:
        """Returns the variables of the base, without updates."""
        others = dict(variables.collections or {})
        params = others.pop(BASE)
        return Variables(params, variables.batch_stats, others or None)

    def with_base(self, variables: Variables, base: Variables) -> Variables:
        """Returns the variables of this model with the given ones of its base."""
        collections = {**(base.collections or {}), BASE: base.params}
        return Variables(variables.params, base.batch_stats, collections)

    def merged(self, variables: Variables) -> Variables:
        """Returns the variables of an ordinary model, with updates merged into its kernels."""
        base = self.base(variables)
        pairs = {leaf_name(p): x for p, x in jax.tree.leaves_with_path(variables.params)}
        scale = self.module.alpha / self.module.rank

        def merged(path: tuple[Any, ...], leaf: Any) -> Any:
            name = leaf_name(path)
            if f"{name}/{_A}" not in pairs:
                return leaf
            a, b = pairs[f"{name}/{_A}"], pairs[f"{name}/{_B}"]
            return leaf + scale * (b @ a if _has_inputs_last(name) else a @ b)

        return base._replace(params=jax.tree.map_with_path(merged, base.params))

    def _pair(self, key: Key, name: str, kernel: Any) -> dict[str, jax.Array]:
        rank = self.module.rank
        rows, columns = kernel.shape
        size, a, b = rows, (rows, rank), (rank, columns)
        if _has_inputs_last(name):
            size, a, b = columns, (rank, columns), (rows, rank)
        drawn = jax.random.normal(key, a, kernel.dtype) * size**-0.5
        return {_A: drawn, _B: jnp.zeros(b, kernel.dtype)}


def rebuild(recorded: Any, cls: Any = None) -> Any:
    """Rebuilds a model, or a `Lora` with its base of class `cls`, from a record.

    Raises:
        CheckpointError: it cannot be rebuilt.
        ConfigError: an option of the `Lora` is out of its range.
    """
    names = {field.name for field in dataclasses.fields(Lora)}
    if not isinstance(recorded, Mapping) or recorded.keys() != names:
        return record.rebuild(recorded, cls)
    options = {name: value for name, value in recorded.items() if name != "module"}
    return Lora(record.rebuild(recorded["module"], cls), **options)


def is_own(name: str) -> bool:
    """Returns whether an array of this name belongs to a `Lora`, not to an ordinary model."""
    return name.startswith(f"{BASE}/") or name.rpartition("/")[2] in (_A, _B)


def _has_inputs_last(name: str) -> bool:
    """Returns whether a kernel is `[out, in]`, as one named `weight` in Equinox and torch."""
    return name.rpartition("/")[2] == "weight"


def _with_pairs(row: LayerRow, pairs: Mapping[str, Any]) -> list[tuple[str, str, Any, Any]]:
    variables = []
    for collection, name, shape, dtype in row.variables:
        if collection != "params":
            variables.append((collection, name, shape, dtype))
            continue
        variables.append((BASE, name, shape, dtype))
        path = "/".join(part for part in (row.path, name) if part)
        for each in (_A, _B):
            if f"{path}/{each}" in pairs:
                leaf = pairs[f"{path}/{each}"]
                variables.append(("params", f"{name}/{each}", tuple(leaf.shape), leaf.dtype))
    return variables

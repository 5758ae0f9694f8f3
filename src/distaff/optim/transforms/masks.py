"""Selection of the parameters that weight decay applies to."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from distaff.core.typing import Params, PyTree
from distaff.errors import ConfigError, leaf_name, nearest

_WORDS = {"bias", "biases", "scale", "scales", "gamma", "beta", "offset", "shift", "gain"}
_BIAS = re.compile(r"b\d*|b_.*")
_NORM = re.compile(r"norm|(^|_)(ln|bn|gn|rms)(_|\d|$)", re.IGNORECASE)
_UNIT_NAMES = {"weight", "w", "g"}
"""Names of a norm layer's scale that other layers use for weights."""


def decay_mask(params: Params) -> PyTree:
    """Returns for each parameter whether weight decay applies to it.

    Decay is for matrices, kernels and embeddings. Biases and the scales of norm layers set the
    offset and size of activations, where a pull towards zero does harm. They are excluded, even if
    stacked over layers, `[layers, features]`:

    * leaves of fewer than two axes;
    * leaves with one of the words bias, scale, gamma, beta, offset, shift or gain in their name,
      such as `bias_ih`, and those called `b`, `b1`, `b_...` (except a `b` alongside an `a`, as in
      LoRA);
    * leaves called `weight`, `w` or `g` of a layer whose name indicates a norm (`norm`,
      `LayerNorm_0`, `ln_1`), or whose bias has the same shape.

    Args:
        params: a pytree of arrays, or of anything with `shape`.

    Returns:
        A pytree of bool with the structure of `params`, for the `mask` argument of Optax.

    Example:
        >>> decay_mask({"kernel": np.ones([3, 2]), "bias": np.ones([2])})
        {'bias': False, 'kernel': True}
    """
    siblings: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        parent, name = _names(path)
        siblings.setdefault(parent, {})[name] = np.shape(leaf)

    def is_decayed(path: tuple[Any, ...], leaf: Any) -> bool:
        parent, name = _names(path)
        return np.ndim(leaf) >= 2 and not _is_spared(parent, name, siblings[parent])

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def make_decay_mask(
    no_decay: Sequence[str] = (), also_decay: Sequence[str] = ()
) -> Callable[[Params], PyTree]:
    """Returns `decay_mask` with exceptions: shell patterns for the paths of parameters.

    `no_decay` wins over `also_decay`.
    """
    if not no_decay and not also_decay:
        return decay_mask

    def mask(params: Params) -> PyTree:
        def is_decayed(path: tuple[Any, ...], by_rule: bool) -> bool:
            name = leaf_name(path)
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in no_decay):
                return False
            return by_rule or any(fnmatch.fnmatchcase(name, pattern) for pattern in also_decay)

        return jax.tree_util.tree_map_with_path(is_decayed, decay_mask(params))

    return mask


def check_patterns(patterns: Mapping[str, Sequence[str]], params: Params) -> None:
    """Checks that each pattern, by option, matches the path of a parameter.

    Raises:
        ConfigError: a pattern matches none.
    """
    names = [leaf_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    for option, each in patterns.items():
        for pattern in each:
            if not fnmatch.filter(names, pattern):
                raise ConfigError(
                    f"A pattern of {option} must match the path of a parameter, and {pattern!r} "
                    f"matches none. {nearest(pattern, names)}"
                )


def words_of(name: str) -> list[str]:
    """Returns the words of a name in lower case: `layerScale_0` has `layer` and `scale`."""
    return re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())


def _names(path: tuple[Any, ...]) -> tuple[str, str]:
    """Returns the path of a leaf's parent, and the leaf's name; skips a box around the leaf."""
    keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
    if len(keys) > 1 and keys[-1] == "value" and isinstance(path[-1], jax.tree_util.GetAttrKey):
        keys.pop()
    return "/".join(keys[:-1]), keys[-1] if keys else ""


def _is_spared(parent: str, name: str, siblings: Mapping[str, tuple[int, ...]]) -> bool:
    if _WORDS.intersection(words_of(name)) or (_BIAS.fullmatch(name) and "a" not in siblings):
        return True
    is_norm = _NORM.search(parent.rpartition("/")[2])
    is_like_bias = siblings.get("bias") == siblings[name]
    return name in _UNIT_NAMES and bool(is_norm or is_like_bias)

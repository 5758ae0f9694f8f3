"""Converts weights between a `GPT` with separate blocks and one with `scan_layers`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distaff.core.typing import Params
from distaff.errors import ConfigError

_BLOCK = re.compile(r"Block_(\d+)")
_STACK = "blocks"


def stacked_blocks(params: Params) -> dict[str, Any]:
    """Converts parameters for `GPT(scan_layers=True)`: one array for all blocks.

    Args:
        params: parameters of a `GPT`, or a tree with the same names, such as Adam's moments.

    Returns:
        The same with `blocks`, each leaf `[num_layers, ...]`, instead of `Block_0`, `Block_1`, ...

    Raises:
        ConfigError: there are no blocks, or they differ in structure or shape.
    """
    names = [name for name in params if _BLOCK.fullmatch(name)]
    expected = [f"Block_{n}" for n in range(len(names))]
    if not names or set(names) != set(expected):
        raise ConfigError(
            "stacked_blocks needs the blocks Block_0, Block_1, ... of a GPT; got "
            f"{sorted(params)}. Pass the parameters of a GPT with scan_layers=False, without the "
            "collection: variables['params']."
        )
    blocks = [params[name] for name in expected]
    shapes = [jax.tree.map(jnp.shape, block) for block in blocks]
    differing = next((n for n, each in enumerate(shapes) if each != shapes[0]), None)
    if differing is not None:
        raise ConfigError(
            f"stacked_blocks needs blocks of equal shapes; Block_{differing} differs from Block_0: "
            f"{shapes[differing]} and {shapes[0]}. Leave scan_layers=False for such a model."
        )
    others = {name: x for name, x in params.items() if name not in names}
    return {**others, _STACK: jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def separate_blocks(params: Params) -> dict[str, Any]:
    """Converts parameters of `GPT(scan_layers=True)` for one without; see `stacked_blocks`.

    Raises:
        ConfigError: there are no stacked blocks.
    """
    stack = params.get(_STACK) if isinstance(params, Mapping) else None
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(stack)}
    if len(lengths) != 1 or lengths == {()}:
        raise ConfigError(
            "separate_blocks needs 'blocks' with leaves [num_layers, ...]; got "
            f"{sorted(params)}. Pass the parameters of a GPT with scan_layers=True, without the "
            "collection: variables['params']."
        )
    ((length,),) = lengths
    blocks = {f"Block_{n}": jax.tree.map(lambda leaf, n=n: leaf[n], stack) for n in range(length)}
    return {**{name: x for name, x in params.items() if name != _STACK}, **blocks}

"""Muon for the hidden matrices of a model, and AdamW for all other parameters, by path."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
import optax.contrib

from distaff.core.typing import Params, PyTree, Schedule
from distaff.errors import ConfigError, leaf_name
from distaff.optim.transforms.masks import decay_mask, words_of

_EMBEDDINGS = ("embed", "unembed", "position")
_TABLES = {"wte", "wpe", "token", "tokens", "vocab"}
_HEADS = {"head", "logits", "classifier", "readout"}


def muon_routes(
    no_muon: Sequence[str] = (), also_muon: Sequence[str] = ()
) -> Callable[[Params], PyTree]:
    """Returns a function from parameters to the layout of each for Muon; empty for AdamW.

    Muon is for the matrices between the first layer and the last (Jordan et al. 2024). A parameter
    of two axes belongs to it: `[input, output]`, or `[output, input]` if its name begins with
    weight, as in Equinox. Excepted are

    * what `decay_mask` excludes: biases and scales of norm layers, also if stacked over layers;
    * embeddings: a part of the path has a word that starts with embed, unembed or position, or one
      of wte, wpe, token, tokens, vocab;
    * heads: the last word of a part of the path is head, logits, classifier or readout, such as
      `lm_head`.

    Args:
        no_muon: shell patterns for the paths of further parameters to exclude, such as a head with
            another name. It wins over `also_muon`.
        also_muon: shell patterns for parameters to include. For other axes than a matrix has,
            a pattern ends with `=` and a letter per axis, `i` for an input, `o` for an output, and
            `b` where each index has a matrix of its own: `Conv_*/kernel=iiio`,
            `*/query/kernel=ioo`, `blocks/*/kernel=bio`.
    """
    chosen = [pattern.partition("=")[::2] for pattern in also_muon]

    def routes(params: Params) -> PyTree:
        def route(path: tuple[Any, ...], leaf: Any, decays: bool) -> str:
            name = leaf_name(path)
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in no_muon):
                return ""
            for pattern, layout in chosen:
                if fnmatch.fnmatchcase(name, pattern):
                    return _checked(layout or _matrix(name), name, np.shape(leaf))
            is_hidden = decays and np.ndim(leaf) == 2 and not _is_at_an_end(name)
            return _matrix(name) if is_hidden else ""

        return jax.tree_util.tree_map_with_path(route, params, decay_mask(params))

    return routes


def routed_muon(
    rate: Schedule, routes: Callable[[Params], PyTree], options: Mapping[str, Any]
) -> optax.GradientTransformation:
    """Returns `optax.contrib.muon` with a route for each parameter.

    Args:
        rate: learning rate of Muon.
        routes: the layout of each parameter for Muon; see `muon_routes`.
        options: further arguments of `optax.contrib.muon`.

    Raises:
        TypeError, ValueError: Optax does not accept the options.
    """
    optax.contrib.muon(rate, **options)

    # Optax would call a function for the axes again with the other parameters masked, and the
    # rule, which looks at the parameters next to one, might then answer differently.
    def with_axes(params: Params) -> optax.GradientTransformation:
        axes = jax.tree.map(_axes, routes(params))
        return optax.contrib.muon(rate, muon_weight_dimension_numbers=axes, **options)

    def update(
        updates: Params, state: PyTree, params: Params | None = None
    ) -> tuple[Params, PyTree]:
        return with_axes(updates).update(updates, state, params)

    return optax.GradientTransformation(lambda params: with_axes(params).init(params), update)


def _axes(layout: str) -> optax.contrib.MuonDimensionNumbers | None:
    if not layout:
        return None
    places = {kind: [i for i, letter in enumerate(layout) if letter == kind] for kind in "io"}
    return optax.contrib.MuonDimensionNumbers(tuple(places["i"]), tuple(places["o"]))


def _matrix(name: str) -> str:
    """Returns the layout of a matrix by its name: Equinox calls its own `weight`."""
    return "oi" if name.rpartition("/")[2].startswith("weight") else "io"


def _checked(layout: str, name: str, shape: tuple[int, ...]) -> str:
    """Returns the layout of a parameter that `also_muon` includes, if it has these axes."""
    if len(layout) != len(shape):
        raise ConfigError(
            f"also_muon takes {name!r} as {layout!r}, a letter per axis, and it has the shape "
            f"{list(shape)}. End its pattern with '=' and a letter for each axis, such as '=iiio' "
            "for a convolution, '=bio' for matrices stacked over layers, or '=ioo': i is an "
            "input, o an output, b the index of a matrix. Biases and scales belong to AdamW."
        )
    return layout


def _is_at_an_end(name: str) -> bool:
    """Returns whether a path leads to an embedding or a head."""
    for part in name.split("/"):
        words = words_of(part)
        is_table = any(word.startswith(_EMBEDDINGS) or word in _TABLES for word in words)
        if is_table or (words and words[-1] in _HEADS):
            return True
    return False

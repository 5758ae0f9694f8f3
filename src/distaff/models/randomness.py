"""The random keys of a pass: how a model gets those that it draws from, and is told of none."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import InvalidRngError

from distaff.core.typing import Key
from distaff.errors import DistaffError, StateError

KEY_NAMES = (
    *("key", "rng", "prng", "prng_key", "rng_key", "random_key", "dropout_key", "dropout_rng"),
    *("sample_key", "sample_rng", "noise_key", "noise_rng", "z_rng"),
)
"""Parameters of these names are given a random key."""

_OWN_FOLDS = {"params": 0, "dropout": 1}
_OF_A_KEY = re.compile(r"\b(key|rng|prng|random)", re.IGNORECASE)
_MISSING = re.compile(r'PRNG for "([^"]*)"')


class NoKeyError(StateError):
    """A model draws random numbers in a pass that has no key to draw from."""


def no_key(model: str, what: str = "") -> NoKeyError:
    """Returns the error for a pass without a key.

    Args:
        model: its name.
        what: what it draws from, such as `stream 'dropout'`.
    """
    drawn = f" from its {what}" if what else ""
    return NoKeyError(
        f"{model} draws random numbers{drawn}, and this pass has no random key. Create the state "
        "with TrainState.create(..., rng=jax.random.key(0)), or pass a key: "
        "ctx.apply(params, x, rngs=key)."
    )


@contextmanager
def asking_for_key(model: str, is_without: bool) -> Generator[None]:
    """Turns what a model fails with that has no key into an error that says so.

    Args:
        model: its name.
        is_without: whether it takes a key and is given none.

    Raises:
        NoKeyError: it fails, without a key.
    """
    try:
        yield
    except DistaffError:
        raise
    except Exception as error:
        if is_without and _OF_A_KEY.search(str(error)):
            raise no_key(model) from error
        raise


def is_key(value: Any) -> bool:
    """Tells a random key, typed or not, from other values."""
    if not isinstance(value, jax.Array | np.ndarray):
        return False
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return value.shape == ()
    return value.dtype == jnp.uint32 and value.shape == (2,)


def streams(key: Key, names: Collection[str] = ("params", "dropout")) -> dict[str, Key]:
    """Returns the keys of Linen's random streams by name, each its own."""
    return {
        name: jax.random.fold_in(key, _OWN_FOLDS.get(name, zlib.crc32(name.encode())))
        for name in names
    }


def drawing(
    call: Callable[[dict[str, Key]], Any],
    key: Key | None,
    *,
    first: Collection[str],
    given: Mapping[str, Key],
    model: str,
) -> Any:
    """Calls a Linen module with the streams that it draws from, and no others.

    Linen answers for a stream that is missing with that of `params`, which `nn.scan` and `nn.vmap`
    do not split. So `params` is not offered, and each stream that is missing is added by its name.

    Args:
        call: takes the streams by name.
        key: source of the streams; None where there is none.
        first: streams to begin with.
        given: streams that the caller passes.
        model: its name, for errors.

    Raises:
        NoKeyError: it draws, and there is no key.
    """
    names = list(first)
    while True:
        own = {} if key is None else streams(key, names)
        try:
            return call({**own, **given})
        except InvalidRngError as error:
            found = _MISSING.search(str(error))
            name = found[1] if found else None
            if key is None:
                raise no_key(model, f"stream {name!r}" if name else "") from error
            if name is None or name in names:
                raise
            names.append(name)

"""The random keys of a pass."""

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
"""Names of parameters that get a random key."""

_OWN_FOLDS = {"params": 0, "dropout": 1}
_OF_A_KEY = re.compile(r"\b(key|rng|prng|random)", re.IGNORECASE)
_MISSING = re.compile(r'PRNG for "([^"]*)"')


class NoKeyError(StateError):
    """A model needs random numbers in a pass without a key."""


def no_key(model: str, what: str = "") -> NoKeyError:
    """Returns the error for a pass without a key; `what` is such as `stream 'dropout'`."""
    source = f" from its {what}" if what else ""
    return NoKeyError(
        f"{model} draws random numbers{source}, but this pass has no random key. Create the state "
        "with TrainState.create(..., rng=jax.random.key(0)), or pass a key: "
        "ctx.apply(params, x, rngs=key)."
    )


@contextmanager
def asking_for_key(model: str, is_without: bool) -> Generator[None]:
    """Converts errors of a model that accepts a key, but gets none, into a `NoKeyError`."""
    try:
        yield
    except DistaffError:
        raise
    except Exception as error:
        if is_without and _OF_A_KEY.search(str(error)):
            raise no_key(model) from error
        raise


def is_key(value: Any) -> bool:
    """Returns whether a value is a random key, typed or not."""
    if not isinstance(value, jax.Array | np.ndarray):
        return False
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return value.shape == ()
    return value.dtype == jnp.uint32 and value.shape == (2,)


def streams(key: Key, names: Collection[str] = ("params", "dropout")) -> dict[str, Key]:
    """Returns an independent key for each of Linen's random streams, by name."""
    return {
        name: jax.random.fold_in(key, _OWN_FOLDS.get(name, zlib.crc32(name.encode())))
        for name in names
    }


def call_with_streams(
    call: Callable[[dict[str, Key]], Any],
    key: Key | None,
    *,
    first: Collection[str],
    given: Mapping[str, Key],
    model: str,
) -> Any:
    """Calls a Linen module with only those random streams that it uses.

    Linen replaces a missing stream by `params`, which `nn.scan` and `nn.vmap` do not split. So
    `params` is not passed, and each missing stream is added by its name.

    Args:
        call: a function of the streams by name.
        key: source of the streams, or None.
        first: names of the streams to start with.
        given: streams from the caller.
        model: name of the model, for errors.

    Raises:
        NoKeyError: the model uses a stream, and there is no key.
    """
    names = list(first)
    while True:
        own = {} if key is None else streams(key, names)
        try:
            return call({**own, **given})
        except InvalidRngError as error:
            missing = _MISSING.search(str(error))
            name = missing[1] if missing else None
            if key is None:
                raise no_key(model, f"stream {name!r}" if name else "") from error
            if name is None or name in names:
                raise
            names.append(name)

"""Kept: the last values that were made, such as blocks that were read."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import RLock
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Kept(Generic[Key, Value]):
    """Values by key, the oldest of which goes before a new one is made.

    Unlike `functools.lru_cache` it holds no function, whose object would hold it in turn: what has
    one is freed at once, with all values. A pickle has none of them. Threads may share it.

    Args:
        most: how many values are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: dict[Key, Value] = {}
        self._lock = RLock()

    def get(self, key: Key, make: Callable[[Key], Value]) -> Value:
        """Returns the value of a key, which is made where it is not kept; never None."""
        value = self._values.get(key)
        if value is not None:
            return value
        with self._lock:
            if key not in self._values:
                while len(self._values) >= self._most:
                    del self._values[next(iter(self._values))]
                self._values[key] = make(key)
            return self._values[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, (self._most,)

"""Kept: a cache of the last values, such as blocks of a file."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import RLock
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Kept(Generic[Key, Value]):
    """A thread-safe cache of `size` values, which evicts the oldest before it makes a new one.

    Unlike `functools.lru_cache`, it holds no function, so there is no reference cycle with its
    owner, and the values are freed with it. A pickle contains no values.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: dict[Key, Value] = {}
        self._lock = RLock()

    def get(self, key: Key, make: Callable[[Key], Value]) -> Value:
        """Returns the cached value of a key, or makes it; values must not be None."""
        value = self._values.get(key)
        if value is not None:
            return value
        with self._lock:
            if key not in self._values:
                while len(self._values) >= self._size:
                    del self._values[next(iter(self._values))]
                self._values[key] = make(key)
            return self._values[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, (self._size,)

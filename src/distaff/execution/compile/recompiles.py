"""Detects programs that compile again, and reports the cause."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.monitoring

from distaff.core.warnings import warn
from distaff.errors import RecompileError, RecompileWarning
from distaff.execution.compile.signature import Difference, Signature, difference, signature

_log = logging.getLogger("distaff")

Recompile: TypeAlias = Literal["warn", "error", "ignore"]
"""What to do when a program unexpectedly compiles again."""

_MAX_REMEMBERED = 64
_MAX_WARNINGS = 5
_MAX_REASONS = 3


class Compile(NamedTuple):
    """A compile of a program.

    Attributes:
        name: its name in JAX, such as `"jit(step)"`; empty if unknown.
        seconds: time to lower and compile, or to read from the compile cache.
        cached: whether it was read from the compile cache on disk.
    """

    name: str
    seconds: float
    cached: bool

    def __str__(self) -> str:
        return f"{self.seconds:.2g} s ({'cached' if self.cached else 'not cached'})"


class Watch:
    """Watches the programs of a trainer, each of which should compile once.

    Args:
        recompile: what to do on an unexpected compile: `"warn"`, `"error"` or `"ignore"`.
        step: returns the completed optimizer updates.
        say: shows a line that is not a warning.
    """

    def __init__(
        self,
        recompile: Recompile = "ignore",
        *,
        step: Callable[[], int] = int,
        say: Callable[[str], object] = str,
    ) -> None:
        self.recompile = recompile
        self._step, self._say = step, say
        self._num_warnings = 0
        self._watched: list[Watched] = []
        self._reasons: list[object] = []

    @property
    def num_compiles(self) -> int:
        """The number of compiles of the watched programs."""
        return sum(watched.num_compiles for watched in self._watched)

    def over(self, program: Any, what: str, arguments: Sequence[str]) -> Watched:
        """Wraps a program to watch its compiles.

        Args:
            program: a function returned by `jax.jit`.
            what: its name in messages, such as `"the step"`.
            arguments: names of its positional arguments.
        """
        watched = Watched(program, what, arguments, self._on_recompile)
        self._watched.append(watched)
        return watched

    def expect(self, reason: object = None, *, num_shapes: int = 1) -> None:
        """Allows one more compile of each program, for example for new data to evaluate.

        Args:
            reason: an object such as the new data; a recent reason does not count again. None
                forgets all reasons.
            num_shapes: number of different shapes of batches; allows a compile for each of them.
        """
        if reason is not None and any(reason is each for each in self._reasons):
            return
        self._reasons = [] if reason is None else [reason, *self._reasons[:_MAX_REASONS]]
        for watched in self._watched:
            watched.num_expected = 1 if reason is None else watched.num_expected + 1
            watched.num_reshapes = num_shapes - 1 + (reason is not None) * watched.num_reshapes

    def _on_recompile(self, what: str, compiled: Compile, found: Difference, is_end: bool) -> None:
        if self.recompile == "ignore":
            return
        text = (
            f"A program should compile once, but {what} compiled again after step {self._step()}, "
            f"in {compiled}: {found.text}. {found.remedy}"
        )
        if self.recompile == "error":
            raise RecompileError(text)
        if is_end:
            _log.info("%s", text)
            self._say(text)
            return
        _log.warning("%s", text)
        self._num_warnings += 1
        if self._num_warnings <= _MAX_WARNINGS:
            last = "Further recompiles are only logged. " * (self._num_warnings == _MAX_WARNINGS)
            text = f"{text} {last}Set recompile='ignore' to disable this warning."
            warn(text, RecompileWarning, stacklevel=2)


class Watched:
    """A program that checks after each call whether the call compiled it.

    Only compiles in this thread and under the program's name count: a call may compile other
    programs, such as a callback's.

    Args:
        program: a function returned by `jax.jit`.
        what: its name in messages.
        arguments: names of its positional arguments.
        on_recompile: called for an unexpected compile; its last argument is whether it may be the
            compile for a smaller batch at the end of an epoch.
    """

    def __init__(
        self,
        program: Any,
        what: str,
        arguments: Sequence[str],
        on_recompile: Callable[[str, Compile, Difference, bool], None],
    ) -> None:
        self._program, self._what, self._arguments = program, what, tuple(arguments)
        self._on_recompile = on_recompile
        self._signatures: deque[Signature] = deque(maxlen=_MAX_REMEMBERED)
        self._name = f"jit({getattr(program, '__name__', '')})"
        self._had_end = False
        self.num_expected, self.num_reshapes, self.num_compiles = 1, 0, 0

    def __call__(self, *args: Any) -> Any:
        before = _COMPILES.count
        result = self._program(*args)
        if _COMPILES.count != before:
            self._check(args, _COMPILES.count - before)
        return result

    def _check(self, args: Sequence[Any], num_compiles: int) -> None:
        recent = [c for c in list(_COMPILES.recent)[-num_compiles:] if c.name in ("", self._name)]
        if not recent:
            return
        compiled, self.num_compiles = recent[-1], self.num_compiles + 1
        _log.info("compiled %s in %s", self._what, compiled)
        new = signature(dict(zip(self._arguments, args, strict=False)))
        is_expected = self.num_expected > 0 or not self._signatures
        self.num_expected = max(0, self.num_expected - 1)
        found = None if is_expected else difference(self._signatures, new)
        self._signatures.append(new)
        if found is not None and found.is_reshaped and self.num_reshapes:
            self.num_reshapes -= 1
        elif found is not None:
            is_end = found.is_resized and not self._had_end
            self._had_end |= is_end
            self._on_recompile(self._what, compiled, found, is_end)


class _Compiles(threading.local):
    """The compiles of one thread."""

    def __init__(self) -> None:
        self.count = 0
        self.recent: deque[Compile] = deque(maxlen=_MAX_REMEMBERED)
        self.lowering, self.is_hit = 0.0, False


_COMPILES = _Compiles()


def count() -> int:
    """Returns the number of compiles in this thread, including reads from the compile cache."""
    return _COMPILES.count


# JAX calls these in the compiling thread: for the cache hit and the lowering before the compile.
def _on_duration(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
        _COMPILES.lowering += duration_secs
    elif event == "/jax/core/compile/backend_compile_duration":
        name, seconds = str(kwargs.get("fun_name", "")), duration_secs + _COMPILES.lowering
        _COMPILES.recent.append(Compile(name, seconds, _COMPILES.is_hit))
        _COMPILES.count += 1
        _COMPILES.lowering, _COMPILES.is_hit = 0.0, False


def _on_event(event: str, **_: str | int) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _COMPILES.is_hit = True


jax.monitoring.register_event_duration_secs_listener(_on_duration)
jax.monitoring.register_event_listener(_on_event)

"""Which programs compile, and why: after its first compile a program is not to compile again."""

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
"""What a compile that nobody expects leads to."""

_MAX_REMEMBERED = 64
_MAX_WARNINGS = 5
_MAX_REASONS = 3


class Compile(NamedTuple):
    """One program that was compiled.

    Attributes:
        name: what JAX calls it, such as `"jit(step)"`; empty where it does not say.
        seconds: that lowering and compiling took, or reading from the compile cache.
        cached: whether it came from the compile cache on disk.
    """

    name: str
    seconds: float
    cached: bool

    def __str__(self) -> str:
        return f"{self.seconds:.2g} s ({'cached' if self.cached else 'not cached'})"


class Watch:
    """Watches the programs of a trainer, each of which shall compile once.

    Args:
        recompile: what a compile that nobody expects leads to: `"warn"`, `"error"` or `"ignore"`.
        step: returns the completed optimizer updates.
        say: shows a line that is no warning.
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

    def over(self, program: Any, what: str, arguments: Sequence[str]) -> Watched:
        """Returns the program, watched.

        Args:
            program: as `jax.jit` returns it.
            what: what to call it, such as `"the step"`.
            arguments: names of its positional arguments.
        """
        watched = Watched(program, what, arguments, self._surprised)
        self._watched.append(watched)
        return watched

    def expect(self, reason: object = None, *, num_shapes: int = 1) -> None:
        """Expects one more compile of each program, as where new data are evaluated.

        Args:
            reason: such as the new data; one that was given lately is none. Without one, all
                reasons count again.
            num_shapes: how many shapes their batches have: those after the first are expected, too.
        """
        if reason is not None and any(reason is each for each in self._reasons):
            return
        self._reasons = [] if reason is None else [reason, *self._reasons[:_MAX_REASONS]]
        for watched in self._watched:
            watched.num_expected = 1 if reason is None else watched.num_expected + 1
            watched.num_reshapes = num_shapes - 1 + (reason is not None) * watched.num_reshapes

    def _surprised(self, what: str, compiled: Compile, found: Difference, is_end: bool) -> None:
        if self.recompile == "ignore":
            return
        text = (
            f"A program compiles once; {what} compiled again after step {self._step()}, in "
            f"{compiled}: {found.text}. {found.remedy}"
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
            last = "Only the log tells of more. " * (self._num_warnings == _MAX_WARNINGS)
            text = f"{text} {last}recompile='ignore' turns this off."
            warn(text, RecompileWarning, stacklevel=2)


class Watched:
    """A program that looks, after each call, at whether that call has compiled it.

    Only what this thread compiles under the program's name counts: a call may compile other
    programs too, as that of a callback or of a constant.

    Args:
        program: as `jax.jit` returns it.
        what: what to call it.
        arguments: names of its positional arguments.
        surprised: is told of a compile that was not expected, and whether it is the one for
            batches of a second size, as an epoch may end with.
    """

    def __init__(
        self,
        program: Any,
        what: str,
        arguments: Sequence[str],
        surprised: Callable[[str, Compile, Difference, bool], None],
    ) -> None:
        self._program, self._what, self._arguments = program, what, tuple(arguments)
        self._surprised = surprised
        self._signatures: deque[Signature] = deque(maxlen=_MAX_REMEMBERED)
        self._name = f"jit({getattr(program, '__name__', '')})"
        self._had_end = False
        self.num_expected, self.num_reshapes = 1, 0

    def __call__(self, *args: Any) -> Any:
        """Calls the program."""
        before = _HEARD.count
        result = self._program(*args)
        if _HEARD.count != before:
            self._look(args, _HEARD.count - before)
        return result

    def _look(self, args: Sequence[Any], num_compiles: int) -> None:
        recent = [c for c in list(_HEARD.recent)[-num_compiles:] if c.name in ("", self._name)]
        if not recent:
            return
        compiled = recent[-1]
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
            self._surprised(self._what, compiled, found, is_end)


class _Heard(threading.local):
    """What one thread has compiled."""

    def __init__(self) -> None:
        self.count = 0
        self.recent: deque[Compile] = deque(maxlen=_MAX_REMEMBERED)
        self.lowering, self.is_hit = 0.0, False


_HEARD = _Heard()


def count() -> int:
    """Returns how many programs this thread has compiled, those from the compile cache included."""
    return _HEARD.count


# JAX tells of these in the thread that compiles, the cache hit and the lowering before the end.
def _hear_duration(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
        _HEARD.lowering += duration_secs
    elif event == "/jax/core/compile/backend_compile_duration":
        name, seconds = str(kwargs.get("fun_name", "")), duration_secs + _HEARD.lowering
        _HEARD.recent.append(Compile(name, seconds, _HEARD.is_hit))
        _HEARD.count += 1
        _HEARD.lowering, _HEARD.is_hit = 0.0, False


def _hear(event: str, **_: str | int) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _HEARD.is_hit = True


jax.monitoring.register_event_duration_secs_listener(_hear_duration)
jax.monitoring.register_event_listener(_hear)

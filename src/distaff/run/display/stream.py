"""An output stream that never raises and never blocks a run."""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import sys
import threading
import time
from collections import deque
from typing import Any

_log = logging.getLogger("distaff")

_PIECE = 1024  # characters: a pipe that can be written takes at least 4096 bytes
_MOST_HELD = 2**20  # characters
_LAST_WAIT = 1.0  # seconds, once a display closes
_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, errno.EINTR)


class SteadyStream:
    """Writes to another stream without blocking or raising.

    Characters that the encoding lacks are escaped. If the reader stalls, up to a million characters
    are buffered and written later; the rest is dropped, with a line that says how much. If the
    stream is closed or its other end is gone, one warning is logged and no more is written. A full
    disk loses only the text that does not fit.

    Args:
        stream: the output.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._held: deque[str] = deque()
        self._num_held = self._num_left_out = 0
        self._is_lost = False
        self._lock = threading.RLock()

    @property
    def encoding(self) -> str:
        """The encoding of the stream."""
        found = getattr(self._stream, "encoding", None)
        return found if isinstance(found, str) else "utf-8"

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        with contextlib.suppress(Exception):
            return bool(self._stream.isatty())
        return False

    def write(self, text: str) -> int:
        """Writes a text, or buffers it."""
        with self._lock:
            if not self._is_lost:
                self._hold(text)
                self._send()
        return len(text)

    def flush(self) -> None:
        """Writes the buffer as far as the stream accepts it."""
        with self._lock:
            self._send()

    def finish(self) -> None:
        """Waits up to a second for a stalled reader, then drops the buffer."""
        deadline = time.monotonic() + _LAST_WAIT
        while self._held and not self._is_lost and time.monotonic() < deadline:
            time.sleep(0.02)
            self.flush()
        with self._lock:
            self._forget()

    def _hold(self, text: str) -> None:
        if self._num_held + len(text) > _MOST_HELD:
            self._num_left_out += text.count("\n")
            return
        pieces = [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]
        self._held.extend(pieces)
        self._num_held += len(text)

    def _send(self) -> None:
        while self._held and not self._is_lost and self._takes_text():
            text = self._held.popleft()
            self._num_held -= len(text)
            if self._num_left_out and not self._held:
                text += f"[{self._num_left_out} lines dropped: the output was not read]\n"
                self._num_left_out = 0
            self._put(text)

    def _put(self, text: str) -> None:
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                escaped = text.encode(error.encoding, "backslashreplace")
                self._stream.write(escaped.decode(error.encoding))
            if hasattr(self._stream, "flush"):
                self._stream.flush()
        except OSError as error:
            if error.errno not in _PASSING:
                self._lose(error)
        except Exception as error:
            self._lose(error)

    def _takes_text(self) -> bool:
        """Whether a piece can be written without blocking; True without a file descriptor."""
        try:
            file = self._stream.fileno()
            if type(file) is not int or file < 0:
                return True
        except Exception:
            return True
        try:
            return _can_be_written(file)
        except (OSError, ValueError) as error:
            self._lose(error)
            return False

    def _lose(self, error: Exception) -> None:
        self._is_lost = True
        self._forget()
        _log.warning("the display cannot be written (%s); the run continues without it", error)

    def _forget(self) -> None:
        self._held.clear()
        self._num_held = self._num_left_out = 0


def _can_be_written(file: int) -> bool:
    """Whether a pipe or terminal has room.

    Raises:
        OSError: its other end is gone. Writing would leave text in the stream's buffer, which fails
            again when Python exits and changes the exit code.
    """
    if not sys.platform.startswith("linux"):  # poll does not support terminals on macOS
        is_known = sys.platform != "win32" and file < 1024
        return bool(select.select([], [file], [], 0)[1]) if is_known else True
    poll = select.poll()
    poll.register(file, select.POLLOUT)
    found = poll.poll(0)
    state = found[0][1] if found else 0
    if state & select.POLLNVAL:
        raise OSError(errno.EBADF, "it is closed")
    if state & (select.POLLERR | select.POLLHUP):
        raise BrokenPipeError(errno.EPIPE, "its other end is gone")
    return bool(state & select.POLLOUT)

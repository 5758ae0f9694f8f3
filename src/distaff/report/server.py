"""Serves a report to the browser of this machine, made again whenever its runs change."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from distaff.errors import ConfigError
from distaff.report.facts import gather_present
from distaff.report.page import page

HOST = "127.0.0.1"

_SHARE = 5.0
"""Seconds between two pages, per second that it takes to make one."""

_FILES = ("config.json", "status.json", "metrics.jsonl", "log.txt", "model.txt", "env.json")
_FOLDERS = ("figures", "images")
_HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class LivePage:
    """The page of a report, made again when a file of its runs has changed.

    Args:
        find: returns the directories of the runs; called again each time.
        image_bytes: the most bytes of figures and images.
        clock: returns a monotonic time in seconds.
    """

    def __init__(
        self,
        find: Callable[[], Sequence[Path]],
        image_bytes: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._find, self._image_bytes, self._clock = find, image_bytes, clock
        self._lock = threading.Lock()
        self._seen: Any = None
        self._due_at = 0.0
        self._made = ("", b"")

    def latest(self) -> tuple[str, bytes]:
        """Returns the version of the page, and its HTML in UTF-8."""
        with self._lock:
            began = self._clock()
            if began >= self._due_at:
                paths = self._find()
                seen = [(str(path), _changes(path)) for path in paths]
                if seen != self._seen:
                    self._seen, self._made = seen, self._make(paths)
                    now = self._clock()
                    self._due_at = now + _SHARE * (now - began)
            return self._made

    def _make(self, paths: Sequence[Path]) -> tuple[str, bytes]:
        facts = gather_present(paths, self._image_bytes)
        version = hashlib.sha256(repr(facts).encode("utf-8", "replace")).hexdigest()[:16]
        return version, page({**facts, "version": version}).encode()


def _changes(path: Path) -> list[tuple[str, int, int]]:
    """Returns the files of a run that a report reads, with their times and sizes."""
    files = [str(path / name) for name in _FILES]
    for folder in _FOLDERS:
        for place, _, names in os.walk(path / folder):
            files += [os.path.join(place, name) for name in sorted(names)]
    found = []
    for file in files:
        with contextlib.suppress(OSError):  # it is not there yet, or was removed
            status = os.stat(file)
            found.append((file, status.st_mtime_ns, status.st_size))
    return found


def make_server(live: LivePage, port: int) -> ThreadingHTTPServer:
    """Returns a server of the page on 127.0.0.1; call `serve_forever`, and close it.

    Args:
        live: the page.
        port: the port; 0 for a free one.

    Raises:
        ConfigError: the port cannot be used.
    """
    handler = type("_Handler", (_PageHandler,), {"live": live})
    try:
        return _PageServer((HOST, port), handler)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"port must be a free port of this machine, or 0 to choose one; got {port}: "
            f"{getattr(error, 'strerror', None) or error}. Pass --port 0."
        ) from error


class _PageServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a browser may keep a connection open

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Does nothing: a browser that hangs up is no error."""


class _PageHandler(BaseHTTPRequestHandler):
    live: LivePage
    timeout = 10  # seconds to send a request
    server_version, sys_version = "distaff", ""

    def do_GET(self) -> None:
        """Answers with the page."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """Answers with the version of the page alone."""
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        # Another host is a page of a web site whose name was pointed at this machine.
        port = self.connection.getsockname()[1]
        known = {f"{name}:{port}" for name in (HOST, "localhost")}
        known |= {HOST, "localhost"} if port == 80 else set()
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or hosts[0].strip().lower() not in known:
            self.send_error(403, "Unknown host")
            return
        if self.path.partition("?")[0] != "/":
            self.send_error(404)
            return
        version, content = self.live.latest()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{version}"')
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Does nothing."""

"""uvicorn: runs the application of `distaff serve`, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

_SIGTERM, _CTRL_C = 143, 130


def run(
    application: Callable[..., Any],
    bound: socket.socket,
    timeout: float,
    on_ready: Callable[[], None],
) -> int:
    """Serves until SIGTERM or Ctrl-C; requests that were accepted are answered first.

    Args:
        application: the ASGI application.
        bound: a bound socket.
        timeout: the most seconds to wait for the last answers.
        on_ready: is called once requests are accepted.

    Returns:
        The exit status: 143 after SIGTERM, 130 after Ctrl-C.
    """
    config = uvicorn.Config(
        application,
        lifespan="on",
        loop="asyncio",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(timeout) + 1,
    )
    with _received() as signals:  # uvicorn raises a signal again after it has ended
        _Server(config, on_ready).run(sockets=[bound])
    return _SIGTERM if signal.SIGTERM in signals else _CTRL_C if signals else 1


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._on_ready()


@contextmanager
def _received() -> Generator[list[int]]:
    """Records SIGTERM and Ctrl-C instead of ending the process."""
    received: list[int] = []

    def record(number: int, _: FrameType | None) -> None:
        received.append(number)

    before = {each: signal.signal(each, record) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

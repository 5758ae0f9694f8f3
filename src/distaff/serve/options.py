"""The options of a server: its address, its batches, and its limits."""

from __future__ import annotations

import dataclasses
from typing import Any

from distaff.core.config.checks import as_float, whole
from distaff.core.config.options import Options, at_least, described, option
from distaff.errors import ConfigError


def _port(name: str, value: Any) -> int:
    port = whole(name, value, least=0)
    if port > 65_535:
        raise ConfigError(f"{name} must be at most 65535; got {port}.")
    return port


def _seconds(name: str, value: Any) -> float:
    seconds = as_float(value)
    if not 0 < seconds <= 86_400:
        raise ConfigError(
            f"{name} must be a number of seconds above 0, up to a day; got {value!r}."
        )
    return seconds


def _wait(name: str, value: Any) -> float:
    seconds = as_float(value)
    if not 0 <= seconds <= 60:
        raise ConfigError(f"{name} must be a number of seconds from 0 to 60; got {value!r}.")
    return seconds


@described
@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions(Options):
    """The options of a server.

    Raises:
        ConfigError: a value is out of range.
    """

    host: str = option("127.0.0.1", "address to listen on; the default is this machine only")
    port: int = option(8000, "port to listen on; 0 takes a free one", check=_port)
    max_batch_size: int = option(
        32,
        """most examples that one program computes. Programs are compiled for 1, 2, 4,
        ... examples, up to this number.""",
        check=at_least(1),
    )
    max_wait: float = option(
        0.0,
        """seconds to wait for other requests before a batch that is not full is computed. With 0,
        the requests that arrive during a batch form the next one.""",
        check=_wait,
    )
    max_rows: int = option(1024, "most examples in one request", check=at_least(1))
    max_body_bytes: int = option(
        16 * 2**20,
        "most bytes of a request, and of its arrays after decompression",
        check=at_least(1),
    )
    max_queue: int = option(
        256, "most requests that are not answered yet; further ones get 503", check=at_least(1)
    )
    timeout: float = option(30.0, "seconds until a request is given up", check=_seconds)

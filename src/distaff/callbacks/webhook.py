"""Webhook: posts the outcome of a run to a URL."""

from __future__ import annotations

import json
import logging
import math
import threading
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

from distaff.callbacks.callback import Callback, StepInfo
from distaff.core.config.checks import as_float
from distaff.core.warnings import warn
from distaff.errors import ConfigError, nearest
from distaff.execution.processes import is_first
from distaff.metrics import as_json

_log = logging.getLogger("distaff")

_ON = ("end", "failure")


class Webhook(Callback):
    """Posts one JSON object to a URL when a run ends.

    The object has `name`, `status`, `reason`, `step`, `epoch` and `metrics`, see `StepInfo`. The
    run waits at most `timeout` seconds. A failed request is one warning, and never ends the run.

    Args:
        url: an http or https URL. Messages only show its host, since such URLs contain secrets.
        on: `"failure"` posts runs that failed, `"end"` all other runs.
        name: name of the run; None for `<name>/<version>` of the run directory.
        body: returns the object to post, given the default one, for services with a form of their
            own: `body=lambda run: {"text": f"{run['name']} {run['status']}"}`.
        timeout: maximum number of seconds.

    Raises:
        ConfigError: an argument is out of its range.
    """

    def __init__(
        self,
        url: str,
        *,
        on: Literal["end", "failure"] | Sequence[str] = _ON,
        name: str | None = None,
        body: Callable[[dict[str, Any]], Any] | None = None,
        timeout: float = 5.0,
    ) -> None:
        self._host = _host(url)
        self.on = (on,) if isinstance(on, str) else tuple(on)
        if unknown := [each for each in self.on if each not in _ON]:
            raise ConfigError(
                f"on of a Webhook has the words 'end' and 'failure'; got {unknown[0]!r}. "
                f"{nearest(str(unknown[0]), _ON)}"
            )
        if not 0 < as_float(timeout) < math.inf:
            raise ConfigError(
                f"timeout must be a positive number of seconds; got {timeout!r}. Write timeout=5.0."
            )
        self._url, self._name, self._body, self._timeout = url, name, body, float(timeout)

    def on_training_end(self, info: StepInfo) -> None:
        """Posts the outcome, and waits for the answer until the time-out.

        With several processes, only the first one posts.
        """
        if not is_first() or ("failure" if info.status == "failed" else "end") not in self.on:
            return
        failures: list[str] = []
        # A socket's own time-out restarts with each byte, and name look-up has none.
        sending = threading.Thread(target=self._send, args=(info, failures), daemon=True)
        sending.start()
        sending.join(self._timeout)
        if sending.is_alive():
            failures = [f"no answer in {self._timeout:g} s"]
        for failure in failures[:1]:
            text = f"Webhook to {self._host} failed: {failure}. The run is not affected."
            _log.warning("%s", text)
            _warn(text)

    def _send(self, info: StepInfo, failures: list[str]) -> None:
        try:
            content = self._outcome(info)
            content = content if self._body is None else self._body(content)
            request = urllib.request.Request(
                self._url,
                json.dumps(content, allow_nan=False).encode(),
                {"Content-Type": "application/json", "User-Agent": "distaff"},
            )
            with urllib.request.urlopen(request, timeout=self._timeout):
                pass
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}".rstrip(". "))

    def _outcome(self, info: StepInfo) -> dict[str, Any]:
        name = self._name
        if name is None:
            name = "/".join(info.path.parts[-2:]) if info.path is not None else ""
        facts = {"name": name, "status": info.status, "reason": info.reason}
        return {**facts, "step": info.step, "epoch": info.epoch, "metrics": as_json(info.metrics)}


def _host(url: Any) -> str:
    """Returns the scheme and the host of a URL.

    Raises:
        ConfigError: it is not an http or https URL.
    """
    is_plain = isinstance(url, str) and url.isascii() and url.isprintable() and " " not in url
    try:
        parts = urlsplit(url if is_plain else "")
        host = parts.hostname if parts.port != 0 else None
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError(
            "The URL of a Webhook begins with http:// or https://, has a host, and no spaces. "
            "Write Webhook('https://example.org/hook')."
        )
    return f"{parts.scheme}://{host}"


def _warn(text: str) -> None:
    try:
        warn(text, stacklevel=3)
    except Warning:  # a program that makes warnings errors must not fail at its last step
        return

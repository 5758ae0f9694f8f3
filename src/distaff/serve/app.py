"""The ASGI application: routes, limits and answers."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from typing import Any, NamedTuple, TypeAlias

from distaff.serve import wire
from distaff.serve.batcher import Batcher, BatchFailedError, QueueFullError
from distaff.serve.figures import Figures
from distaff.serve.model import ServedModel
from distaff.serve.options import ServeOptions
from distaff.serve.wire import RequestError

_log = logging.getLogger("distaff")

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

_METHODS = {"/predict": "POST", "/health": "GET", "/metrics": "GET", "/model": "GET"}
_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_INLINE_BYTES = 32_768
"""Larger bodies are read in a thread, so that other requests are answered meanwhile."""


class _Answer(NamedTuple):
    status: int
    body: bytes
    content_type: str = wire.JSON
    headers: tuple[tuple[str, str], ...] = ()
    closes: bool = False


class _DisconnectedError(Exception):
    """The client is gone."""


class Application:
    """An ASGI 3 application that answers requests for the outputs of a model.

    Run it with any ASGI server that has a lifespan, or with `distaff serve`. It answers
    `POST /predict`, `GET /model`, `GET /health` and `GET /metrics`.

    Args:
        model: the model.
        options: batches and limits; host and port are the server's.
    """

    def __init__(self, model: ServedModel, options: ServeOptions | None = None) -> None:
        self._model, self._options = model, options or ServeOptions()
        self._figures = Figures()
        self._batcher: Batcher | None = None
        self._num_requests = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handles a connection, as the ASGI specification describes."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self._batcher = Batcher(self._model, self._options, self._figures)
                self._batcher.start()
                await send({"type": "lifespan.startup.complete"})
            else:
                if self._batcher is not None:
                    await self._batcher.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        start = time.perf_counter()
        try:
            answer = await self._answer(scope, receive)
        except _DisconnectedError:
            return
        if scope["path"] == "/predict":
            self._figures.request(answer.status, time.perf_counter() - start)
        headers = {
            "content-type": answer.content_type,
            "content-length": str(len(answer.body)),
            "x-content-type-options": "nosniff",
            **dict(answer.headers),
            **({"connection": "close"} if answer.closes else {}),
        }
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": raw})
        body = b"" if scope["method"] == "HEAD" else answer.body
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Message, receive: Receive) -> _Answer:
        try:
            return await self._routed(scope, receive)
        except RequestError as error:
            is_unread = error.status in (404, 405, 408, 413, 415)
            return _Answer(error.status, error.body(), closes=is_unread)
        except QueueFullError:
            error = RequestError(503, "The server is at its limit, or ends. Try again later.")
            return _Answer(503, error.body(), headers=(("retry-after", "1"),))
        except TimeoutError:
            seconds = self._options.timeout
            error = RequestError(
                504, f"The request took longer than {seconds:g} s. Send fewer rows."
            )
            return _Answer(504, error.body())
        except _DisconnectedError:
            raise
        except Exception as failure:
            if not isinstance(failure, BatchFailedError):
                _log.exception("A request failed.")
            error = RequestError(500, "The model failed; the log of the server has the error.")
            return _Answer(500, error.body())

    async def _routed(self, scope: Message, receive: Receive) -> _Answer:
        path, method = scope["path"], scope["method"]
        if path not in _METHODS:
            raise RequestError(404, f"There is no such path. Known: {', '.join(_METHODS)}.")
        if method != _METHODS[path] and not (method == "HEAD" and _METHODS[path] == "GET"):
            error = RequestError(405, f"{path} takes {_METHODS[path]}.")
            allow = (("allow", _METHODS[path]),)
            return _Answer(405, error.body(), headers=allow, closes=True)
        if path == "/predict":
            return await self._counted(scope, receive)
        if path == "/model":
            return _Answer(200, json.dumps(self._described()).encode())
        if path == "/metrics":
            return _Answer(200, self._figures.text(self._num_requests).encode(), _TEXT)
        is_ready = self._batcher is not None and not self._batcher.is_closed
        status = "ok" if is_ready else "not ready"
        return _Answer(200 if is_ready else 503, json.dumps({"status": status}).encode())

    async def _counted(self, scope: Message, receive: Receive) -> _Answer:
        batcher = self._batcher
        if batcher is None or batcher.is_closed or self._num_requests >= self._options.max_queue:
            raise QueueFullError
        self._num_requests += 1
        try:
            return await self._predict(batcher, scope, receive)
        finally:
            self._num_requests -= 1

    async def _predict(self, batcher: Batcher, scope: Message, receive: Receive) -> _Answer:
        headers = {name.decode("latin-1").lower(): value for name, value in scope["headers"]}
        kind = wire.kind_of(headers.get("content-type", b"").decode("latin-1"))
        body = await self._body(receive, headers.get("content-length"))
        accepted = headers.get("accept", b"").decode("latin-1").lower()
        answered = next((each for each in (wire.JSON, wire.NPZ) if each in accepted), kind)
        async with asyncio.timeout(self._options.timeout):
            inputs, rows = await self._in_thread(len(body), self._read, body, kind)
            outputs = await batcher.submit(inputs, rows)
            size = sum(array.nbytes for array in outputs.values())
            return _Answer(
                200, await self._in_thread(size, wire.write, outputs, answered), answered
            )

    def _read(self, body: bytes, kind: str) -> tuple[dict[str, Any], int]:
        limits = self._options
        return wire.read(
            body,
            kind,
            self._model.inputs,
            max_bytes=limits.max_body_bytes,
            max_rows=limits.max_rows,
        )

    async def _in_thread(self, size: int, function: Callable[..., Any], *args: Any) -> Any:
        if size <= _INLINE_BYTES:
            return function(*args)
        return await asyncio.to_thread(function, *args)

    async def _body(self, receive: Receive, length: bytes | None) -> bytes:
        """Returns the body of a request, which must arrive in time and within the limit."""
        if (
            length is not None
            and length.isdigit()
            and int(length[:20]) > self._options.max_body_bytes
        ):
            raise self._too_large()
        try:
            async with asyncio.timeout(self._options.timeout):
                return b"".join([part async for part in self._parts(receive)])
        except TimeoutError:
            raise RequestError(408, "The body did not arrive in time.") from None

    async def _parts(self, receive: Receive) -> AsyncGenerator[bytes]:
        size, is_whole = 0, False
        while not is_whole:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _DisconnectedError
            part = message.get("body", b"")
            size += len(part)
            if size > self._options.max_body_bytes:
                raise self._too_large()
            is_whole = not message.get("more_body", False)
            yield part

    def _too_large(self) -> RequestError:
        most = self._options.max_body_bytes
        return RequestError(413, f"A request may have {most} bytes. Send several requests.")

    def _described(self) -> dict[str, Any]:
        model, limits = self._model, self._options
        return {
            "inputs": {name: str(form) for name, form in model.inputs.items()},
            "outputs": {name: str(form) for name, form in model.outputs.items()},
            "batch_sizes": list(model.sizes),
            "max_rows": limits.max_rows,
            "max_body_bytes": limits.max_body_bytes,
        }

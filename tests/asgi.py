"""Talks to an ASGI application without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Sends requests to an application whose lifespan has begun."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def request(
        self,
        method: str,
        path: str,
        parts: Sequence[bytes] = (b"",),
        headers: dict[str, str] | None = None,
        *,
        ends: bool = True,
    ) -> Answer:
        """Sends a request whose body arrives in parts; `ends=False` lacks the last part."""
        raw = [(k.encode(), v.encode()) for k, v in (headers or {}).items()]
        scope = {"type": "http", "method": method, "path": path, "headers": raw}
        waiting, sent = list(parts), []

        async def receive() -> dict[str, Any]:
            if not waiting:
                await asyncio.Event().wait()
            body = waiting.pop(0)
            return {"type": "http.request", "body": body, "more_body": bool(waiting) or not ends}

        async def send(message: Any) -> None:
            sent.append(message)

        await self._app(scope, receive, send)
        found = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
        return Answer(sent[0]["status"], found, sent[1]["body"])

    async def predict(
        self, body: bytes, content_type: str = "application/json", **headers: str
    ) -> Answer:
        return await self.request(
            "POST", "/predict", [body], {"content-type": content_type, **headers}
        )

    async def inputs(self, **arrays: Any) -> Answer:
        """Sends inputs in JSON."""
        return await self.predict(
            json.dumps({"inputs": {name: x.tolist() for name, x in arrays.items()}}).encode()
        )


@asynccontextmanager
async def session(app: Any) -> AsyncGenerator[Client]:
    """Begins the lifespan of an application, and ends it."""
    messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    task = asyncio.create_task(app({"type": "lifespan"}, messages.get, answers.put))
    await messages.put({"type": "lifespan.startup"})
    assert (await answers.get())["type"] == "lifespan.startup.complete"
    try:
        yield Client(app)
    finally:
        await messages.put({"type": "lifespan.shutdown"})
        assert (await answers.get())["type"] == "lifespan.shutdown.complete"
        await task


def talk(app: Any, conversation: Callable[[Client], Awaitable[Any]]) -> Any:
    """Runs a conversation with an application, and returns its result."""

    async def main() -> Any:
        async with session(app) as client:
            return await conversation(client)

    return asyncio.run(main())

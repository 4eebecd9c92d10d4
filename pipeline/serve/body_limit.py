"""How much of a request's body Ray Serve's proxy holds.

The proxy reads a body as fast as it comes, also while the request waits for a replica. Here it stops where the server
would refuse the request anyway; the refusal itself comes from the server.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.middleware import Middleware

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

MAX_BYTES = "RAY_DFINE_SERVE_MAX_BYTES"  # in the environment of the proxy
ENTRANCE = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pipeline.serve.body_limit.middlewares"}


def environment(max_bytes: int) -> dict[str, str]:
    """To be set where Ray starts: its processes inherit it."""
    return {**ENTRANCE, MAX_BYTES: str(max_bytes)}


def middlewares() -> list[Middleware]:
    """Called by the proxy when it starts."""
    return [Middleware(BodyLimit, max_bytes=int(os.environ[MAX_BYTES]))]


class BodyLimit:
    """Asks for no more of a body once it is longer than `max_bytes`; the sender then waits."""

    def __init__(self, app: App, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        received = 0

        async def bounded() -> Message:
            nonlocal received
            if received > self.max_bytes:
                await asyncio.Event().wait()  # until the answer, which ends the reading
            message = await receive()
            received += len(message.get("body", b""))
            return message

        await self.app(scope, bounded, send)

"""Limit how much of a request body Ray Serve's proxy buffers.

The proxy reads a body as fast as it arrives, even while the request waits for a replica. This middleware stops reading
where the server would refuse the request anyway. The refusal itself comes from the server.
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

MAX_BYTES = "RAY_DFINE_SERVE_MAX_BYTES"  # environment variable of the proxy
CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pipeline.serve.body_limit.middlewares"}


def proxy_environment(max_bytes: int) -> dict[str, str]:
    """Environment variables for the process that starts Ray; its proxies inherit them."""
    return {**CALLBACK, MAX_BYTES: str(max_bytes)}


def middlewares() -> list[Middleware]:
    """Create the middlewares. The proxy calls this function when it starts."""
    return [Middleware(BodyLimit, max_bytes=int(os.environ[MAX_BYTES]))]


class BodyLimit:
    """Middleware that stops reading a body after `max_bytes`, so that the sender has to wait."""

    def __init__(self, app: App, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Forward the request with a limited body."""
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            if received > self.max_bytes:
                await asyncio.Event().wait()  # until the response ends the request
            message = await receive()
            received += len(message.get("body", b""))
            return message

        await self.app(scope, limited_receive, send)

"""Limits that Ray Serve's proxy enforces before a request has a replica, and JSON for the proxy's own errors.

- A body is read no further than a replica would accept; the refusal itself comes from the replica.
- Headers must be complete within a time limit. The replica has the one for bodies.
- A request whose replica ended is answered 503, so that clients repeat it.
"""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import uvicorn.config
from starlette.middleware import Middleware
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

MAX_BYTES = "RAY_DFINE_SERVE_MAX_BYTES"  # environment variables of the proxy
HEADER_S = "RAY_DFINE_SERVE_HEADER_S"
CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pipeline.serve.proxy.middlewares"}
DEFAULT_HEADER_S = 10.0
RETRY_AFTER_S = 1
# Statuses of the proxy itself, to status and sentence here. Its text/plain tells them from those of a replica.
PROXY_ERRORS = {
    404: (503, "the detector is not running, retry later"),
    408: (504, "not finished in time: send fewer or smaller images, or retry later"),
    503: (503, "busy or starting, retry later"),
}
REPLICA_ENDED = (503, "the process that worked on the request ended, retry it")


def proxy_environment(max_bytes: int, header_s: float = DEFAULT_HEADER_S) -> dict[str, str]:
    """Environment variables for the process that starts Ray; its proxies inherit them."""
    return {**CALLBACK, MAX_BYTES: str(max_bytes), HEADER_S: str(header_s)}


def middlewares() -> list[Middleware]:
    """Create the middlewares. The proxy calls this function when it starts, before its HTTP server."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:HeaderDeadline"  # uvicorn has no such setting
    return [Middleware(JsonErrors), Middleware(BodyLimit, max_bytes=int(os.environ[MAX_BYTES]))]


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


class JsonErrors:
    """Middleware that answers with JSON and Retry-After where the proxy has plain text, or no response at all."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Forward the request."""
        started = replaced = False

        async def send_json(message: Message) -> None:
            nonlocal started, replaced
            if message["type"] == "http.response.start":
                kinds = [value for name, value in message["headers"] if name.lower() == b"content-type"]
                replaced = message["status"] in PROXY_ERRORS and kinds != [b"application/json"]
                if replaced:
                    await _send_error(send, *PROXY_ERRORS[message["status"]])
                started = True
            if not replaced:
                await send(message)

        await self.app(scope, receive, send_json)
        if not started and scope["type"] == "http":  # the replica ended, or the client did and takes no response
            await _send_error(send, *REPLICA_ENDED)


class HeaderDeadline(HttpToolsProtocol):
    """HTTP connection that is closed with status 408 if the headers of a request do not arrive in time."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection."""
        super().connection_made(transport)
        self._start_deadline()

    def on_message_begin(self) -> None:
        """Begin to read a request; a connection may have several."""
        super().on_message_begin()
        self._start_deadline()

    def on_headers_complete(self) -> None:
        """Begin to respond."""
        self._stop_deadline()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the connection."""
        self._stop_deadline()
        super().connection_lost(exc)

    def _start_deadline(self) -> None:
        self._stop_deadline()
        seconds = float(os.environ.get(HEADER_S, DEFAULT_HEADER_S))
        self._deadline = self.loop.call_later(seconds, self._refuse, seconds)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, seconds: float) -> None:
        head, body = _json_error(408, f"the headers were not complete within {seconds:g} s")
        lines = [b"HTTP/1.1 408 Request Timeout", b"connection: close", *(b": ".join(pair) for pair in head)]
        self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        self.transport.close()


async def _send_error(send: Send, status: int, error: str) -> None:
    head, body = _json_error(status, error)
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


def _json_error(status: int, error: str) -> tuple[list[tuple[bytes, bytes]], bytes]:
    body = json.dumps({"error": error}).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status in (503, 504):
        head.append((b"retry-after", str(RETRY_AFTER_S).encode()))
    return head, body

"""Middlewares and connection of the proxy, on uvicorn as Ray Serve starts it, used through sockets."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
import uvicorn.config

from pipeline.serve.proxy import middlewares, proxy_environment
from tests.support.processes import free_port, wait_until


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Stand for Ray Serve's proxy: it ends without a response if a replica ends, and has plain text for errors of its own."""
    status = {"/ok": 200, "/busy": 503, "/late": 408, "/json": 503}.get(scope["path"])
    if status is None:
        return
    kind = b"application/json" if scope["path"] == "/json" else b"text/plain"
    await send({"type": "http.response.start", "status": status, "headers": [[b"content-type", kind]]})
    await send({"type": "http.response.body", "body": b'{"error": "its own"}'})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    for name, value in proxy_environment(1000, header_s=1.0).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", uvicorn.config.HTTP_PROTOCOLS["auto"])
    wrapped: Any = application
    for middleware in middlewares():
        wrapped = middleware.cls(wrapped, *middleware.args, **middleware.kwargs)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(wrapped, port=port, lifespan="off", log_config=None))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    wait_until(lambda: server.started)
    yield port
    server.should_exit = True
    thread.join()


def answers(port: int, *parts: bytes, pause_s: float = 0.0) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        for part in parts:
            client.sendall(part)
            time.sleep(pause_s)
        received = b""
        while part := client.recv(65536):
            received += part
    return received


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()


@pytest.mark.parametrize(
    ("path", "status", "sentence"),
    [
        ("/ended", 503, "ended, retry it"),
        ("/busy", 503, "retry later"),
        ("/late", 504, "not finished in time"),
        ("/json", 503, "its own"),
        ("/ok", 200, "its own"),
    ],
)
def test_errors_of_the_proxy_are_json(port: int, path: str, status: int, sentence: str) -> None:
    head, body = answers(port, get(path)).lower().split(b"\r\n\r\n", 1)
    assert int(head.split()[1]) == status
    assert sentence in json.loads(body.split(b"\r\n")[1] if b"chunked" in head else body)["error"]
    if path in ("/ended", "/busy", "/late"):
        assert b"content-type: application/json" in head
        assert b"retry-after: 1" in head


@pytest.mark.parametrize("before", [b"", b"GET /ok HTTP/1.1\r\nHost: a\r\n\r\n"])
def test_headers_have_a_deadline_that_further_bytes_do_not_extend(port: int, before: bytes) -> None:
    started_at = time.monotonic()
    received = answers(port, before, b"GET /ok HTTP/1.1\r\nHost", b"x", b"x", pause_s=0.2)
    assert time.monotonic() - started_at < 10
    assert received.count(b"HTTP/1.1 200") == bool(before)
    head, body = received[received.index(b"HTTP/1.1 408") :].split(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    assert json.loads(body) == {"error": "the headers were not complete within 1 s"}


def test_slow_headers_within_the_deadline_and_a_slow_next_request_are_answered(port: int) -> None:
    parts = (b"GET /ok HTTP/1.1\r\n", b"Host: a\r\n", b"\r\n")
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        for _ in range(2):
            for part in parts:
                client.sendall(part)
                time.sleep(0.1)
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
            time.sleep(1.3)  # an idle connection has no headers to complete

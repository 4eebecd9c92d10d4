"""Detection service in this process, without Ray: asked directly, or behind a plain server for a browser."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dfine_core import LoadedDetector
from pipeline.serve.page import read_page
from pipeline.serve.replica import DetectionService, ServeSettings, json_response
from tests.support.browser import Page, browser


def detected_by(service: DetectionService, query: str, content: bytes, *, status: int = 200) -> dict[str, Any]:
    """Answer to an image, as parsed JSON."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    scope = {
        "type": "http",
        "method": "POST",
        "headers": [(b"content-type", b"image/jpeg")],
        "query_string": query.encode(),
    }
    response = asyncio.run(service.detect(Request(scope, receive)))
    assert response.status_code == status, bytes(response.body)
    answer: dict[str, Any] = json.loads(bytes(response.body))
    return answer


@contextmanager
def opened(source: str, **settings: Any) -> Iterator[DetectionService]:
    """Service whose decoders end with the block."""
    service = DetectionService(ServeSettings(source=source, **settings))
    try:
        yield service
    finally:
        service.decoders.close()


@contextmanager
def served(service: DetectionService) -> Iterator[str]:
    """Address of a server of one process, with the routes that the page asks for."""
    text, headers = read_page()

    async def detect(request: Request) -> Response:
        return await service.detect(request)

    async def model(_: Request) -> Response:
        return json_response(service.description())

    async def page(_: Request) -> Response:
        return Response(text, headers=headers, media_type="text/html; charset=utf-8")

    routes = [Route("/detect", detect, methods=["POST"]), Route("/model", model), Route("/", page)]
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def example_page(detector: LoadedDetector, folder: Path, query: str = "") -> Iterator[Page]:
    """Page of a server of this detector, once it shows the detections of its example; `folder` takes all files."""
    (folder / "browser").mkdir(parents=True)
    with (
        opened(str(detector.save(folder / "detector"))) as service,
        browser(folder / "browser") as page,
        served(service) as address,
    ):
        page.open(f"{address}/?example{query}")
        page.wait_for("document.body.dataset.state === 'done'")
        yield page

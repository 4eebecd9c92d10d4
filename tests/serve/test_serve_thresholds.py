"""Thresholds of a served detector, without Ray."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dfine_core.thresholds import ClassThresholds
from pipeline.data.sources.synthetic import CLASSES
from pipeline.serve.page import read_page
from pipeline.serve.replica import DetectionService, ServeSettings, json_response
from tests.support.browser import browser
from tests.support.small_detectors import small_detector
from tests.support.synthetic_shards import synthetic_records


def detected_by(service: DetectionService, query: str, content: bytes) -> dict[str, Any]:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    scope = {
        "type": "http",
        "method": "POST",
        "headers": [(b"content-type", b"image/jpeg")],
        "query_string": query.encode(),
    }
    response = asyncio.run(service.detect(Request(scope, receive)))
    assert response.status_code == 200, bytes(response.body)
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


def test_the_thresholds_of_the_detector_decide_unless_a_request_or_the_server_has_one(tmp_path: Path) -> None:
    own = ClassThresholds((0.3, None, 0.6), (None,) * 3, 0.9)
    detector = replace(small_detector(CLASSES[:3]), thresholds=own)
    folder = str(detector.save(tmp_path / "detector"))
    content = synthetic_records(1)[0].image
    with opened(folder) as service:
        every = detected_by(service, "threshold=0", content)
        found = detected_by(service, "", content)
        two = detected_by(service, "max_detections=2", content)
        assert service.description()["thresholds"] == [0.3, 0.4, 0.6]
    pairs = zip(every["detections"][0]["scores"], every["detections"][0]["labels"], strict=True)
    expected = [score for score, label in pairs if score >= (0.3, 0.4, 0.6)[label]]
    assert 0 < len(expected) < len(every["detections"][0]["scores"])
    assert found["detections"][0]["scores"] == expected
    assert found["threshold"] == detector.threshold_text()
    assert every["threshold"] == "0, as given"
    assert len(two["detections"][0]["scores"]) == 2
    with opened(folder, threshold=0.5) as one:
        assert one.description()["thresholds"] == [0.5, 0.5, 0.5]
        assert all(score >= 0.5 for score in detected_by(one, "", content)["detections"][0]["scores"])


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


@pytest.mark.slow  # a browser
def test_the_page_starts_with_the_models_thresholds_and_names_them(tmp_path: Path) -> None:
    own = ClassThresholds((0.3, None, 0.6), (None,) * 3, 0.9)
    detector = replace(small_detector(CLASSES[:3]), thresholds=own)
    for name, each in (("own", detector), ("plain", replace(detector, thresholds=None))):
        (tmp_path / f"browser-{name}").mkdir()
        with (
            opened(str(each.save(tmp_path / name))) as service,
            browser(tmp_path / f"browser-{name}") as page,
            served(service) as address,
        ):
            page.open(f"{address}/?example")
            page.wait_for("document.body.dataset.state === 'done'")
            assert page.evaluate("element('own').checked") == (name == "own")
            assert page.evaluate("element('own-label').hidden") == (name == "plain")
            assert page.evaluate("element('own-text').textContent") == each.threshold_text()
            least = list(each.least_scores())
            shown = page.evaluate("document.querySelectorAll('#list button').length")
            assert shown == page.evaluate(f"detections.filter(e => e.score >= {least}[e.label]).length") > 0
            page.evaluate("slider.value = 0.5; slider.dispatchEvent(new Event('input'))")
            shown = page.evaluate("document.querySelectorAll('#list button').length")
            assert shown == page.evaluate("detections.filter(e => e.score >= 0.5).length")
            assert page.messages == []

"""Mutated requests: each is answered, or refused with JSON and a sentence; none fails the server."""

import asyncio
import json
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from pipeline.serve.replica import DetectionService, ServeSettings
from tests.support.fuzzed_requests import FuzzedRequest, RequestFuzzer
from tests.support.served_detector import exported_detector

COUNT = 3000
REFUSED = {400, 408, 413, 415, 422, 503}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Unclosed file <tempfile.Spooled")  # in memory, of forms that cannot be parsed
@pytest.mark.filterwarnings("ignore:Exception ignored in. <function SpooledTemporaryFile")
def test_mutated_requests_are_answered_or_refused(tmp_path: Path) -> None:
    settings = ServeSettings(
        source=str(exported_detector(tmp_path / "exported", ["disc", "box"])), max_megabytes=0.3, max_images=4
    )
    service = DetectionService(settings)
    fuzzer, statuses, slowest = RequestFuzzer(0), Counter[int](), 0.0

    async def one(fuzzed: FuzzedRequest) -> None:
        nonlocal slowest
        started_at = time.monotonic()
        response = await service.detect(Request(_scope(fuzzed), _body(fuzzed.body)))
        slowest = max(slowest, time.monotonic() - started_at)
        statuses[response.status_code] += 1
        content = json.loads(bytes(response.body))
        if response.status_code != 200:
            assert response.status_code in REFUSED, (fuzzed, content)
            assert len(content["error"]) > 20, (fuzzed, content)

    async def all_of_them() -> None:
        for _ in range(COUNT // 4):
            await asyncio.gather(*(one(fuzzer.request()) for _ in range(4)))

    try:
        asyncio.run(all_of_them())
        first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert service.problem() is None
        assert service.active_requests == 0
        asyncio.run(all_of_them())
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - first
    finally:
        service.decoders.close()
    assert sum(statuses.values()) == 2 * COUNT
    assert min(statuses[200], statuses[415], statuses[422], statuses[413]) > COUNT // 50, statuses
    assert slowest < settings.timeout_s
    assert grown < 100_000, f"{grown} KiB"


def _scope(fuzzed: FuzzedRequest) -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": "/detect",
        "query_string": fuzzed.query,
        "headers": [*fuzzed.headers, (b"content-length", str(len(fuzzed.body)).encode())],
    }


def _body(content: bytes) -> Any:
    parts = [content[: len(content) // 2], content[len(content) // 2 :]]

    async def receive() -> dict[str, Any]:
        body = parts.pop(0) if parts else b""
        return {"type": "http.request", "body": body, "more_body": bool(parts)}

    return receive

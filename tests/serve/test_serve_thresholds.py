"""Thresholds of a served detector, without Ray."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.requests import Request

from dfine_core.thresholds import ClassThresholds
from pipeline.data.sources.synthetic import CLASSES
from pipeline.serve.replica import DetectionService, ServeSettings
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


def test_the_thresholds_of_the_detector_decide_unless_a_request_or_the_server_has_one(tmp_path: Path) -> None:
    own = ClassThresholds((0.3, None, 0.6), (None,) * 3, 0.9)
    detector = replace(small_detector(CLASSES[:3]), thresholds=own)
    folder = str(detector.save(tmp_path / "detector"))
    content = synthetic_records(1)[0].image
    service = DetectionService(ServeSettings(source=folder))
    every = detected_by(service, "threshold=0", content)
    found = detected_by(service, "", content)
    pairs = zip(every["detections"][0]["scores"], every["detections"][0]["labels"], strict=True)
    expected = [score for score, label in pairs if score >= (0.3, 0.4, 0.6)[label]]
    assert 0 < len(expected) < len(every["detections"][0]["scores"])
    assert found["detections"][0]["scores"] == expected
    assert found["threshold"] == detector.threshold_text()
    assert every["threshold"] == "0, as given"
    assert len(detected_by(service, "max_detections=2", content)["detections"][0]["scores"]) == 2
    assert service.description()["thresholds"] == [0.3, 0.4, 0.6]
    one = DetectionService(ServeSettings(source=folder, threshold=0.5))
    assert one.description()["thresholds"] == [0.5, 0.5, 0.5]
    assert all(score >= 0.5 for score in detected_by(one, "", content)["detections"][0]["scores"])

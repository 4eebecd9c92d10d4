"""Server on Ray Serve, used over HTTP as by a client: responses, limits, overload, the page in a browser."""

import base64
import io
import json
import re
import socket
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import save_file

from dfine_core import Detector, LoadedDetector, ModelConfig, load
from pipeline.config import ConfigError
from pipeline.serve.replica import ServeSettings
from tests.support.browser import Page, browser
from tests.support.processes import descendants, free_port
from tests.support.served_detector import request, served_by_command

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # raised by pydantic about Ray Serve's own code
    from jobs import serve as serve_job
    from pipeline.serve import deployment

NAMES = ["disc", "box", "ring"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported detector with random weights."""
    torch.manual_seed(0)
    config = ModelConfig.variant("n", num_classes=3, input_size=(96, 128), num_queries=12)
    detector = Detector(config)
    with torch.no_grad():  # scores cover the whole range, so that thresholds matter and no two are equal
        for head in [detector.decoder.enc_score_head, *detector.decoder.dec_score_head]:
            head.weight.normal_(std=0.3)
            head.bias.normal_()
    folder = tmp_path_factory.mktemp("exported")
    weights = {name: tensor.clone() for name, tensor in detector.state_dict().items()}  # without shared memory
    save_file(weights, folder / "model.safetensors")
    (folder / "detector.json").write_text(json.dumps({"config": asdict(config), "categories": NAMES}))
    return folder


@pytest.fixture(scope="module")
def direct(folder: Path) -> LoadedDetector:
    return load(folder, "cpu")


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    port = free_port()
    settings = ServeSettings(
        source=str(folder), batch_size=8, max_waiting=20, max_megabytes=1, max_megapixels=2, max_images=4, timeout_s=20
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        try:
            url = deployment.start(settings, host="127.0.0.1", port=port)
            assert url == f"http://127.0.0.1:{port}"
            yield port
        finally:
            deployment.stop()


def test_invalid_arguments_are_reported_before_anything_starts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for arguments, message in (
        ([str(tmp_path)], "no detector"),
        ([str(folder), "--threshold", "2"], r"--threshold: 2 is not in 0\.\.1"),
        ([str(folder), "--batch-size", "0"], "--batch-size: 0 is less than 1"),
        ([str(folder), "--detach"], "set RAY_ADDRESS"),
    ):
        with pytest.raises(SystemExit) as ended:
            serve_job.main(arguments)
        assert re.search(message, f"{ended.value}\n{capsys.readouterr().err}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings, port = ServeSettings(source=str(folder)), taken.getsockname()[1]
        with pytest.raises(ConfigError, match=r"cannot listen on .*choose another --port"):
            deployment.start(settings, host="127.0.0.1", port=port)


@pytest.mark.parametrize(
    ("host", "warned"), [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True)]
)
def test_listening_on_other_than_the_loopback_address_prints_a_warning(
    host: str, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_job.warn_if_public(host)
    assert ("warning" in capsys.readouterr().out) == warned


def encoded_image(width: int, height: int, seed: int = 0, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (max(1, height // 8), max(1, width // 8), 3), np.uint8)
    written = io.BytesIO()
    PIL.Image.fromarray(pixels).resize((width, height)).save(written, kind)
    return written.getvalue()


def assert_same(detected: dict[str, Any], direct: LoadedDetector, content: bytes, threshold: float) -> None:
    (found,) = direct(content, threshold)
    assert len(found.labels) > 0
    np.testing.assert_allclose(detected["scores"], found.scores, atol=1e-5)
    # Equal scores have no order of their own, which then depends on the batch.
    rows = zip(detected["labels"], detected["names"], detected["scores"], detected["boxes"], strict=True)
    expected = list(zip(found.labels.tolist(), found.names, found.scores, found.boxes, strict=True))
    for label, name, score, box in rows:
        equal = [
            row
            for row in expected
            if row[:2] == (label, name)
            and abs(row[2] - score) < 1e-5
            and np.allclose(row[3], box, rtol=1e-4, atol=1e-2)
        ]
        assert equal, (label, name, score, box)
        expected = [row for row in expected if row is not equal[0]]
    with PIL.Image.open(io.BytesIO(content)) as image:
        assert (detected["width"], detected["height"]) == image.size


def test_every_form_of_a_request_returns_the_detections_of_a_direct_call(port: int, direct: LoadedDetector) -> None:
    first, second = encoded_image(100, 80, 1), encoded_image(70, 150, 2, "JPEG")
    form = b"".join(
        b'--XX\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + content + b"\r\n"
        for content in (first, second)
    )
    option = b'--XX\r\nContent-Disposition: form-data; name="threshold"\r\n\r\n0.3\r\n--XX--\r\n'
    as_json = {"images": [base64.b64encode(content).decode() for content in (first, second)], "threshold": 0.3}
    for body, kind in (
        (form + option, "multipart/form-data; boundary=XX"),
        (json.dumps(as_json).encode(), "application/json"),
    ):
        status, headers, payload = request(port, "/detect", body, Content_Type=kind)
        assert (status, headers["x-content-type-options"]) == (200, "nosniff")
        assert payload["model"] == direct.origin
        assert len(payload["detections"]) == 2
        for detected, content in zip(payload["detections"], (first, second), strict=True):
            assert_same(detected, direct, content, 0.3)
    _, _, payload = request(port, "/detect?threshold=0.2&max_detections=3", first, Content_Type="image/png")
    assert len(payload["detections"][0]["scores"]) == 3
    assert payload["detections"][0]["scores"] == sorted(payload["detections"][0]["scores"], reverse=True)


def test_parallel_requests_of_different_sizes_get_their_own_detections(port: int, direct: LoadedDetector) -> None:
    images = [encoded_image(40 + 13 * number, 150 - 7 * number, number) for number in range(16)]
    before = metric(port, "detect_batch_images_count")
    with ThreadPoolExecutor(16) as pool:
        responses = list(
            pool.map(lambda content: request(port, "/detect?threshold=0.2", content, Content_Type="image/png"), images)
        )
    assert [status for status, _, _ in responses] == [200] * 16
    for (_, _, payload), content in zip(responses, images, strict=True):
        assert_same(payload["detections"][0], direct, content, 0.2)
    assert metric(port, "detect_batch_images_count") - before < 16  # some were batched


def test_health_and_model_describe_the_server(port: int, direct: LoadedDetector) -> None:
    assert request(port, "/health")[::2] == (200, {"status": "ready"})
    status, _, model = request(port, "/model")
    assert status == 200
    assert (model["origin"], model["names"], model["input_size"]) == (direct.origin, NAMES, [96, 128])
    assert model["limits"] == {"max_bytes": 1_000_000, "max_images": 4, "max_pixels": 2_000_000, "timeout_s": 20}
    assert set(model["versions"]) == {"python", "torch", "ray"}


def metric(port: int, name: str, **labels: str) -> float:
    _, headers, text = request(port, "/metrics")
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == name and sample.labels == labels)


def test_metrics_count_requests_by_status_images_and_seconds(port: int) -> None:
    names = [("detect_requests_total", {"status": "200"}), ("detect_requests_total", {"status": "415"})]
    names += [("detect_images_total", {}), ("detect_request_seconds_count", {}), ("detect_batch_images_sum", {})]
    before = [metric(port, name, **labels) for name, labels in names]
    assert request(port, "/detect", encoded_image(30, 30), Content_Type="image/png")[0] == 200
    assert request(port, "/detect", b"hello", Content_Type="image/png")[0] == 415
    after = [metric(port, name, **labels) for name, labels in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 1, 2, 1]


@pytest.mark.parametrize(
    ("path", "kind", "body", "status", "field"),
    [
        ("/detect", "text/plain", b"x", 415, "Content-Type"),
        ("/detect", "image/png", b"x", 415, "body"),
        ("/detect?threshold=2", "image/png", b"x", 422, "threshold"),
        ("/detect", "application/json", b'{"images": ["/etc/passwd"]}', 422, "images[0]"),
        ("/detect", "image/png", encoded_image(2000, 1001), 413, "body"),
        ("/detect", "image/png", b"x" * 1_000_001, 413, "body"),
        ("/nothing", "image/png", b"x", 404, None),
        ("/health", "image/png", b"x", 405, None),
    ],
)
def test_errors_are_json_that_names_the_field(
    port: int, path: str, kind: str, body: bytes, status: int, field: str | None
) -> None:
    response_status, headers, payload = request(port, path, body, Content_Type=kind)
    assert (response_status, headers["content-type"]) == (status, "application/json")
    assert payload.get("field") == field
    assert len(payload["error"]) > 20


def test_a_body_with_too_large_a_content_length_is_refused_before_it_is_sent(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(
            b"POST /detect HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 9000000000\r\n\r\n"
        )
        assert client.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_body_of_unknown_length_is_refused_where_it_gets_too_long(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        head = b"POST /detect HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
        client.sendall(head + b"10000\r\n" + b"x" * 65536 + b"\r\n")
        for _ in range(15):
            client.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_full_replica_asks_to_retry_and_still_reports_its_health(port: int) -> None:
    """The replica is filled by 20 requests whose bodies do not end."""
    unfinished = b"POST /detect HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 900000\r\n\r\nx"
    clients: list[socket.socket] = []

    def open_unfinished_request() -> None:
        clients.append(socket.create_connection(("127.0.0.1", port), timeout=30))
        clients[-1].sendall(unfinished)

    try:
        for _ in range(20):
            open_unfinished_request()
        deadline = time.monotonic() + 10
        while (response := request(port, "/detect", encoded_image(30, 30), Content_Type="image/png"))[0] != 503:
            assert time.monotonic() < deadline
            open_unfinished_request()  # the request above may have taken the place of one that was refused
        assert response[1]["retry-after"] == "1"
        assert "retry later" in response[2]["error"]
        assert request(port, "/health")[0] == 200
    finally:
        for client in clients:
            client.close()
    deadline = time.monotonic() + 20
    while request(port, "/detect", encoded_image(30, 30), Content_Type="image/png")[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_client_cannot_raise_the_time_limit(folder: Path) -> None:
    """Ray Serve accepts a header for it, but the limit of the replica holds. Tested without Ray."""
    import asyncio

    from starlette.requests import Request

    from pipeline.serve.replica import DetectionService

    async def never() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    service = DetectionService(ServeSettings(source=str(folder), timeout_s=0.2))
    headers = [(b"content-type", b"image/png"), (b"x-request-timeout-seconds", b"0")]
    scope = {"type": "http", "method": "POST", "path": "/detect", "query_string": b"", "headers": headers}
    try:
        response = asyncio.run(service.detect(Request(scope, never)))
    finally:
        service.decoders.close()
    assert response.status_code == 504
    assert "not finished within 0.2 s" in bytes(response.body).decode()
    assert (service.active_requests, service.metrics["detect_requests_total", "504"]) == (0, 1)


def test_the_page_has_a_strict_policy(port: int) -> None:
    status, headers, text = request(port, "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'sha256-")
    assert "<canvas" in text


@pytest.fixture(scope="module")
def page(port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page


SHOWN = "document.querySelectorAll('#list button').length"


@pytest.mark.slow
def test_the_page_draws_boxes_and_the_slider_filters_without_another_request(port: int, page: Page) -> None:
    page.open(f"http://127.0.0.1:{port}/?example&threshold=0")
    page.wait_for("document.body.dataset.state === 'done'")
    assert "480 \u00d7 320 px" in page.evaluate("document.getElementById('status').textContent")
    assert "3 classes \u00b7 128 \u00d7 96 px \u00b7 cpu" in page.evaluate(
        "document.getElementById('model').textContent"
    )
    assert page.evaluate(SHOWN) == 36  # 12 queries x 3 classes
    before = metric(port, "detect_request_seconds_count")
    scores = page.evaluate("detections.map(each => each.score)")
    for least in (0.3, 0.6, 1):
        page.evaluate(f"slider.value = {least}; slider.dispatchEvent(new Event('input'))")
        kept = sum(score >= least for score in scores)
        assert page.evaluate(SHOWN) == kept
        boxes = "1 box" if kept == 1 else f"{kept} boxes"
        assert (f"Image with {boxes}" if kept else "Image without boxes") in page.evaluate(
            "canvas.getAttribute('aria-label')"
        )
    assert "No detection reaches this score." in page.evaluate("document.getElementById('list').textContent")
    assert metric(port, "detect_request_seconds_count") == before
    assert page.messages == []  # no error, no violation of the policy


@pytest.mark.slow
def test_a_box_is_drawn_where_it_was_detected(port: int, page: Page) -> None:
    page.open(f"http://127.0.0.1:{port}/?example&threshold=0")
    page.wait_for("document.body.dataset.state === 'done'")
    changed = """(() => {
        const paper = canvas.getContext("2d"), all = () => paper.getImageData(0, 0, canvas.width, canvas.height).data;
        show(image, {scores: [0.9], labels: [0], names: ["disc"], boxes: [[120, 80, 360, 240]], width: 480, height: 320}, "");
        const drawn = all();
        draw([]);
        const plain = all(), scale = parseFloat(canvas.dataset.scale);
        return [[120, 160], [360, 160], [240, 80], [240, 240], [240, 160], [60, 160]].map(([x, y]) => {
            const at = 4 * (Math.round(y * scale) * canvas.width + Math.round(x * scale));
            return drawn[at] !== plain[at] || drawn[at + 1] !== plain[at + 1];
        });
    })()"""
    assert page.evaluate(changed) == [True, True, True, True, False, False]  # four edges, inside, outside


@pytest.mark.slow
def test_the_page_is_usable_with_the_keyboard(port: int, page: Page) -> None:
    page.open(f"http://127.0.0.1:{port}/?example&threshold=0")
    page.wait_for("document.body.dataset.state === 'done'")
    visited = []
    for _ in range(3):
        page.press("Tab")
        visited.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert visited == ["file", "threshold", "BUTTON"]
    assert page.evaluate("marked === detections[0]")
    page.evaluate("slider.focus()")
    page.press("End")
    assert page.evaluate("document.getElementById('threshold-text').textContent") == "100 %"


@pytest.mark.slow
def test_the_page_shows_errors_of_the_server(port: int, page: Page) -> None:
    page.open(f"http://127.0.0.1:{port}/")
    page.wait_for("document.body.dataset.state === 'ready'")
    error = "document.getElementById('error').textContent"
    page.evaluate("detect(new File(['hello'], 'a.png', {type: 'image/png'}))")
    assert page.evaluate("document.body.dataset.state") == "error"
    assert "not an image in a known format: send one of JPEG" in page.evaluate(error)
    assert "HTTP 415" in page.evaluate(error)
    page.evaluate("detect(new File(['hello'], 'a.txt', {type: 'text/plain'}))")
    assert "a.txt is not an image (text/plain)" in page.evaluate(error)
    page.evaluate("detect(new File([new Uint8Array(1000001)], 'a.png', {type: 'image/png'}))")
    assert "1.0 MB exceed the limit of 1 MB per request" in page.evaluate(error)
    page.evaluate("example().then(detect)")
    assert page.evaluate("document.getElementById('error').hidden")


@pytest.mark.slow
def test_the_command_serves_until_sigterm(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with served_by_command(log, folder, "--replicas", "2", "--cpus", "0.5") as (port, server):
        assert f"curl -F image=@image.jpg http://127.0.0.1:{port}/detect" in log.read_text()
        with ThreadPoolExecutor(8) as pool:
            responses = pool.map(
                lambda n: request(port, "/detect", encoded_image(60, 50, n), Content_Type="image/png"), range(12)
            )
        assert [status for status, _, _ in responses] == [200] * 12
        time.sleep(2 * deployment.REPORT_INTERVAL_S)
        assert [metric(port, "detect_requests_total", status="200") for _ in range(4)] == [
            12
        ] * 4  # summed over both replicas
        (adds,) = [pid for pid, title in descendants(server).items() if "MetricsAggregator" in title]
        assert psutil.Process(adds).memory_full_info().pss < 220e6  # Ray Serve's own processes take 124 MB
        assert "torch" not in Path(f"/proc/{adds}/maps").read_text()
    with pytest.raises(ConnectionRefusedError):
        request(port, "/health")

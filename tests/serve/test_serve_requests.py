"""Server without Ray: parsing of requests, batching, metrics, and the policy of the page."""

import asyncio
import base64
import hashlib
import io
import json
import random
import subprocess
import sys
import threading
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.serve.batching import Batcher
from pipeline.serve.decoding import EncodedImage, decode_images
from pipeline.serve.metrics import SECONDS, Metrics, ReplicaMetrics, observe, prometheus_text
from pipeline.serve.page import read_page
from pipeline.serve.proxy import BodyLimit
from pipeline.serve.request_error import RequestError
from pipeline.serve.request_parsing import (
    DetectRequest,
    RequestLimits,
    parse_request,
    read_body,
)

LIMITS = RequestLimits(max_bytes=100_000, max_images=3, max_pixels=10_000)
FORM = "multipart/form-data; boundary=XX"


def encoded_image(width: int = 40, height: int = 30, kind: str = "PNG") -> bytes:
    written = io.BytesIO()
    PIL.Image.effect_noise((width, height), 50).convert("RGB").save(written, kind)
    return written.getvalue()


def form(*parts: tuple[str, bytes, str | None]) -> bytes:
    """Form of parts (name, content, file name)."""
    lines = []
    for name, content, file in parts:
        named = f'; filename="{file}"' if file is not None else ""
        lines.append(
            f'--XX\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + content + b"\r\n"
        )
    return b"".join(lines) + b"--XX--\r\n"


def as_json(**content: Any) -> bytes:
    return json.dumps(content).encode()


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def parsed(content_type: str, body: bytes, **query: str) -> DetectRequest:
    return asyncio.run(parse_request(content_type, query, body, LIMITS))


def read(*chunks: bytes, **headers: str) -> tuple[bytes, int]:
    """Read a body; also return how many chunks were requested."""
    taken = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal taken
        for chunk in chunks:
            taken += 1
            yield chunk

    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return asyncio.run(read_body(body(), named, 100)), taken


def test_the_three_forms_of_a_request_hold_the_same_images() -> None:
    first, second = encoded_image(), encoded_image(20, 50)
    for one in (
        parsed(FORM, form(("image", first, "a.png"), ("image", second, "b.png"), ("threshold", b"0.25", None))),
        parsed("application/json", as_json(images=[base64_of(first), base64_of(second)], threshold=0.25)),
    ):
        assert [image.content for image in one.images] == [first, second]
        assert (one.threshold, one.max_detections) == (0.25, 300)
    assert parsed("image/png", first, threshold="0.25", max_detections="7") == DetectRequest(
        (EncodedImage("body", first),), 0.25, 7
    )


def test_options_have_defaults_and_the_body_takes_precedence_over_the_query() -> None:
    assert parsed("image/png", b"x").threshold is None
    body = as_json(images=[base64_of(b"x")], threshold=0.5)
    assert parsed("application/json; charset=utf-8", body, threshold="0.1", max_detections="9") == DetectRequest(
        (EncodedImage("images[0]", b"x"),), 0.5, 9
    )


@pytest.mark.parametrize(
    ("content_type", "body", "query", "status", "field", "message"),
    [
        ("", b"x", {}, 415, "Content-Type", "without a type"),
        ("text/plain", b"x", {}, 415, "Content-Type", "cannot read text/plain: send a form"),
        ("application/x-www-form-urlencoded", b"image=/etc/passwd", {}, 415, "Content-Type", "send a form"),
        ("image/png", b"x", {"treshold": "0.4"}, 422, "treshold", "known: threshold, max_detections"),
        ("image/png", b"x", {"threshold": "1.5"}, 422, "threshold", "less than or equal to 1"),
        ("image/png", b"x", {"threshold": "nan"}, 422, "threshold", "finite|greater"),
        ("image/png", b"x", {"coverage": "1"}, 422, "coverage", "less than 1"),
        ("image/png", b"x", {"coverage": "nan"}, 422, "coverage", "finite|greater"),
        ("image/png", b"x", {"max_detections": "0"}, 422, "max_detections", "greater than or equal to 1"),
        ("application/json", b"{", {}, 422, "body", "Invalid JSON"),
        pytest.param("application/json", b"[" * 50_000, {}, 422, "body", "Invalid JSON", id="deep JSON"),
        ("application/json", b"\xff\xfe", {}, 422, "body", "Invalid JSON"),
        ("application/json", b"{}", {}, 422, "images", "Field required"),
        ("application/json", as_json(images="abc"), {}, 422, "images", "valid array"),
        ("application/json", as_json(images=[]), {}, 422, "image", "contains no image"),
        ("application/json", as_json(images=["eA==", 3]), {}, 422, "images[1]", "valid string"),
        (
            "application/json",
            as_json(images=["/etc/passwd"]),
            {},
            422,
            "images[0]",
            "paths and URLs are not opened",
        ),
        ("application/json", as_json(images=["http://a.b/c.png"]), {}, 422, "images[0]", "URLs are not opened"),
        ("application/json", as_json(images=["data:image/png;base64,eA=="]), {}, 422, "images[0]", "up to the comma"),
        ("application/json", as_json(images=["eA=="] * 4), {}, 413, None, "4 images exceed the limit of 3"),
        ("application/json", as_json(images=["/"] * 4), {}, 413, None, "4 images exceed the limit of 3"),
        ("application/json", as_json(images=[""] * 20_000), {}, 413, None, "more than 3 images"),
        ("application/json", as_json(images=["eA=="], url="x"), {}, 422, "url", "known: .*images"),
        (FORM, form(*[("image", b"x", "a")] * 4), {}, 413, None, "4 images exceed the limit of 3"),
        (FORM, form(*[("image", b"x", "a")] * 9), {}, 413, None, "more than 3 images"),
        (FORM, form(), {}, 422, "image", "contains no image"),
        (FORM, form(("image", b"/etc/passwd", None)), {}, 422, "image", "files named image"),
        (FORM, form(("picture", b"x", "a")), {}, 422, "picture", "files named image"),
        (FORM, b"--YY\r\n\r\n", {}, 422, "body", "cannot be read"),
        ("multipart/form-data", b"x", {}, 422, "body", "boundary"),
    ],
)
def test_an_invalid_request_is_refused_with_its_field_and_a_way_out(
    content_type: str, body: bytes, query: dict[str, str], status: int, field: str | None, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        parsed(content_type, body, **query)
    assert (refused.value.status, refused.value.field) == (status, field)


def test_a_body_with_too_large_a_content_length_is_refused_unread() -> None:
    assert read(b"ab", b"cd", content_length="4") == (b"abcd", 2)
    with pytest.raises(RequestError, match="exceeds 100 bytes") as refused:
        read(b"x" * 101, content_length="101")
    assert refused.value.status == 413


def test_a_body_of_unknown_length_is_read_no_further_than_allowed() -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"x" * 30

    with pytest.raises(RequestError, match="exceeds 100 bytes"):
        asyncio.run(read_body(endless(), {}, 100))
    assert taken == 4


def test_a_compressed_body_is_refused() -> None:
    with pytest.raises(RequestError, match="not be compressed") as refused:
        read(b"x", content_encoding="gzip")
    assert refused.value.status == 415


def test_images_are_decoded_unchanged() -> None:
    encoded = [
        EncodedImage("a", encoded_image()),
        EncodedImage("b", encoded_image(50, 20, "BMP")),
        EncodedImage("c", encoded_image(9, 9, "TIFF")),
    ]
    decoded = decode_images(encoded, 10_000)
    assert [image.size for image in decoded] == [(40, 30), (50, 20), (9, 9)]
    for image, source in zip(decoded, encoded, strict=True):
        assert np.array_equal(image, PIL.Image.open(io.BytesIO(source.content)).convert("RGB"))


def test_images_marked_as_turned_are_upright() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    PIL.Image.new("RGB", (40, 30)).save(stream, "JPEG", exif=exif)
    (image,) = decode_images([EncodedImage("a", stream.getvalue())], 10_000)
    assert image.size == (30, 40)


def test_pixels_are_counted_before_any_is_decoded() -> None:
    # The header of the second image claims 60,000 x 50,000 pixels; there is no such data to decode.
    header = bytearray(encoded_image())
    header[16:24] = (60_000).to_bytes(4, "big") + (50_000).to_bytes(4, "big")
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    with pytest.raises(RequestError) as refused:
        decode_images([EncodedImage("images[0]", encoded_image()), EncodedImage("images[1]", bytes(header))], 10_000)
    assert (refused.value.status, refused.value.field) == (413, "images[1]")
    with pytest.raises(
        RequestError, match=r"with the images before it, 100 x 60 pixels exceed the limit of 10,000"
    ) as refused:
        decode_images(
            [EncodedImage("images[0]", encoded_image(100, 60)), EncodedImage("images[1]", encoded_image(100, 60))],
            10_000,
        )
    assert (refused.value.status, refused.value.field) == (413, "images[1]")


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"/etc/passwd"]
)
def test_a_file_that_is_not_an_image_is_refused(content: bytes) -> None:
    with pytest.raises(RequestError, match="not an image in a known format: send one of JPEG, PNG") as refused:
        decode_images([EncodedImage("image[0]", content)], 10_000)
    assert (refused.value.status, refused.value.field) == (415, "image[0]")


def test_a_path_given_as_bytes_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded_image())
    with pytest.raises(RequestError, match="not an image in a known format"):
        decode_images([EncodedImage("body", str(tmp_path / "a.png").encode())], 10_000)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_broken_image_is_refused(kind: str) -> None:
    with pytest.raises(RequestError, match="save it again") as refused:
        decode_images([EncodedImage("image[0]", encoded_image(90, 90, kind)[:-900])], 10_000)
    assert (refused.value.status, refused.value.field) == (422, "image[0]")


class Work:
    """Worker that waits for `go`, doubles numbers and stores its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        assert self.go.wait(10)
        if 13 in items:
            raise ValueError("unlucky")
        return [2 * item for item in items]


async def _turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0.001)


def test_everything_queued_when_the_worker_is_free_forms_one_batch() -> None:
    async def scenario() -> None:
        calls = [asyncio.create_task(batcher([n])) for n in (1,)]
        await _turns()
        calls += [asyncio.create_task(batcher(items)) for items in ([2, 3], [4], [5, 6])]
        await _turns()
        work.go.set()
        assert await asyncio.gather(*calls) == [[2], [4, 6], [8], [10, 12]]

    work = Work()
    with ThreadPoolExecutor(1) as pool:
        batcher = Batcher(work, 4, pool)
        asyncio.run(scenario())
    assert work.batches == [
        [1],
        [2, 3, 4, 5],
        [6],
    ]  # first alone and at once; then at most four, so one call spans two batches


def test_items_of_a_cancelled_call_are_removed_from_later_batches() -> None:
    async def scenario() -> None:
        calls = [asyncio.create_task(batcher([n])) for n in (1, 2, 3)]
        await _turns()
        calls[1].cancel()
        await _turns()
        work.go.set()
        assert [await calls[0], await calls[2]] == [[2], [6]]

    work = Work()
    with ThreadPoolExecutor(1) as pool:
        batcher = Batcher(work, 1, pool)
        asyncio.run(scenario())
    assert work.batches == [[1], [3]]


def test_a_failed_batch_raises_in_its_callers_and_the_next_one_works() -> None:
    async def scenario() -> None:
        work.go.set()
        with pytest.raises(ValueError, match="unlucky"):
            await batcher([12, 13])
        assert await batcher([14]) == [28]

    work = Work()
    with ThreadPoolExecutor(1) as pool:
        batcher = Batcher(work, 4, pool)
        asyncio.run(scenario())


def test_metrics_are_read_by_prometheus_own_parser() -> None:
    random.seed(0)
    values = [random.expovariate(1) for _ in range(200)] + [0.01, 100.0]
    metrics: Metrics = Counter()
    for value in values:
        observe(metrics, "detect_request_seconds", value)
    metrics["detect_requests_total", "200"] += 3
    metrics["detect_requests_total", "413"] += 1
    metrics["detect_images_total", ""] += 5
    families = {family.name: family for family in text_string_to_metric_families(prometheus_text(metrics))}
    requests = families["detect_requests"]
    assert requests.type == "counter"
    assert {sample.labels["status"]: sample.value for sample in requests.samples} == {"200": 3, "413": 1}
    assert families["detect_images"].samples[0].value == 5
    seconds = {
        (sample.name, sample.labels.get("le")): sample.value for sample in families["detect_request_seconds"].samples
    }
    for bound in SECONDS:
        assert seconds["detect_request_seconds_bucket", str(bound)] == sum(value <= bound for value in values)
    assert seconds["detect_request_seconds_bucket", "+Inf"] == seconds["detect_request_seconds_count", None] == 202
    assert seconds["detect_request_seconds_sum", None] == pytest.approx(sum(values))


def test_metrics_are_summed_over_replicas_including_stopped_ones() -> None:
    metrics = ReplicaMetrics()
    metrics.update("a", Counter({("detect_images_total", ""): 3}))
    metrics.update("b", Counter({("detect_images_total", ""): 4}))
    assert metrics.update("a", Counter({("detect_images_total", ""): 5})) == {("detect_images_total", ""): 9}
    assert metrics.update("c", Counter()) == {("detect_images_total", ""): 9}


def test_the_process_that_adds_up_the_metrics_imports_no_torch() -> None:
    script = (
        "import pickle, sys; from pipeline.serve.metrics import MetricsAggregator as kind;"
        " assert pickle.loads(pickle.dumps(kind)) is kind; print(*{'torch', 'ray', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_the_proxy_stops_reading_a_body_that_is_too_long() -> None:
    received = 0

    async def endless() -> dict[str, Any]:
        nonlocal received
        received += 1
        return {"type": "http.request", "body": b"x" * 40, "more_body": True}

    async def greedy(_: Any, receive: Any, __: Any) -> None:
        while True:
            await receive()

    async def scenario() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(BodyLimit(greedy, max_bytes=100)({"type": "http"}, endless, None), 0.05)  # type: ignore[arg-type]

    asyncio.run(scenario())
    assert received == 3


def test_the_page_may_run_its_own_scripts_and_nothing_else() -> None:
    text, headers = read_page()
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert "unsafe" not in headers["Content-Security-Policy"]
    for tag, source in (("script", "script-src"), ("style", "style-src")):
        content = text.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[source] == f"'sha256-{digest}'"
    for outside in ("http:", "https:", "//cdn", "@import", "style=", "onclick=", "src="):
        assert outside not in text, outside

"""Detector behind HTTP, inside one process: requests, responses, limits and metrics.

`pipeline/serve/deployment.py` runs it on Ray Serve.
"""

import asyncio
import json
import logging
import platform
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import PIL.Image
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from torch import Tensor

from dfine_core.inference import prepare
from dfine_core.model.postprocess import MAX_DETECTIONS, Detections
from pipeline.config import Config, Share
from pipeline.open_detector import open_detector
from pipeline.serve.batching import Batcher
from pipeline.serve.metrics import Metrics, observe
from pipeline.serve.request_parsing import (
    DetectRequest,
    RequestError,
    RequestLimits,
    decode_images,
    parse_request,
    read_body,
)

logger = logging.getLogger("ray.serve")  # Ray Serve configures its files and level
NOSNIFF = {"X-Content-Type-Options": "nosniff"}
RETRY_AFTER_S = 1
CLIENT_CLOSED_REQUEST = 499  # status of a request whose client disconnected; counted only


class ServeSettings(Config):
    """Detector to serve, and limits of its requests."""

    source: str  # any source of `open_detector`
    threshold: Share | None = None  # unless a request has its own; default: the detector's, class by class
    batch_size: PositiveInt = 8  # images per forward pass, at most
    timeout_s: PositiveFloat = 30.0  # per request, from its arrival at a replica to the response
    max_waiting: PositiveInt = 32  # requests in a replica; further ones get status 503
    max_megabytes: PositiveFloat = 20.0  # per request body
    max_images: PositiveInt = 16  # per request
    max_megapixels: PositiveFloat = 50.0  # per request
    replicas: PositiveInt = 1
    cpus: PositiveFloat = 1.0  # per replica; also the number of threads of its detector
    gpus: NonNegativeFloat = Field(0.0, description="per replica; a fraction shares one GPU")

    @property
    def limits(self) -> RequestLimits:
        """Limits of one request, in bytes and pixels."""
        return RequestLimits(int(self.max_megabytes * 1e6), self.max_images, int(self.max_megapixels * 1e6))


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """Image resized to the input size."""

    pixels: Tensor  # [1, 3, H, W] uint8
    size: tuple[int, int]  # width, height of the original image


class DetectionService:
    """Service that is ready once constructed: its detector is loaded and has processed an image."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.loaded = open_detector(settings.source, "cuda" if settings.gpus else "cpu").deploy()
        self.metrics: Metrics = Counter()
        self.active_requests = 0
        self.last_batch_failed = False
        self._decoders = ThreadPoolExecutor(min(4, max(1, int(settings.cpus))), "decode")
        self._batcher = Batcher(self._forward, settings.batch_size, ThreadPoolExecutor(1, "detect"))
        # On a GPU the largest batch is tried too, so that a lack of memory shows now.
        for images in {1, settings.batch_size} if settings.gpus else {1}:
            self._detect([self._prepare(PIL.Image.new("RGB", (64, 48)))] * images)

    async def detect(self, request: Request) -> Response:
        """Return the response to POST /detect, which may be an error."""
        arrived_at = time.perf_counter()
        try:
            response = await self._limited_response(request)
        except RequestError as error:
            response = error_response(error)
        except ClientDisconnect:
            response = Response(status_code=CLIENT_CLOSED_REQUEST)
        except Exception:
            logger.exception("a request failed")
            response = error_response(RequestError(500, "the detector failed; see the log of the server"))
        self.metrics["detect_requests_total", str(response.status_code)] += 1
        observe(self.metrics, "detect_request_seconds", time.perf_counter() - arrived_at)
        return response

    async def check_health(self) -> None:
        """Process one image if the last batch failed; raises if the detector still fails."""
        if self.last_batch_failed:
            await self._batcher([self._prepare(PIL.Image.new("RGB", (64, 48)))])

    def description(self) -> dict[str, Any]:
        """Content of GET /model."""
        config = self.loaded.config
        return {
            "origin": self.loaded.origin,
            "names": list(self.loaded.names),
            "input_size": list(config.input_size),  # height, width
            "num_queries": config.num_queries,
            "device": str(self.loaded.device),
            "thresholds": list(self.loaded.least_scores(self.settings.threshold)),  # in the order of the names
            "threshold_text": self.loaded.threshold_text(self.settings.threshold),
            "max_detections": MAX_DETECTIONS,
            "batch_size": self.settings.batch_size,
            "limits": asdict(self.settings.limits) | {"timeout_s": self.settings.timeout_s},
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        }

    async def _limited_response(self, request: Request) -> Response:
        """Respond within the limits on waiting requests and time."""
        if self.active_requests >= self.settings.max_waiting:
            raise RequestError(
                503, f"busy: {self.active_requests} requests are waiting, retry later", retry_after_s=RETRY_AFTER_S
            )
        self.active_requests += 1
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                return json_response(await self._detect_in_request(request))
        except TimeoutError:
            message = f"not finished within {self.settings.timeout_s:g} s: send fewer or smaller images, or retry later"
            raise RequestError(504, message, retry_after_s=RETRY_AFTER_S) from None
        finally:
            self.active_requests -= 1

    async def _detect_in_request(self, http_request: Request) -> dict[str, Any]:
        # 1. Parse and check the request, before any image is decoded.
        limits = self.settings.limits
        body = await read_body(http_request.stream(), http_request.headers, limits.max_bytes)
        content_type = http_request.headers.get("content-type", "")
        request = await parse_request(content_type, http_request.query_params, body, limits)
        threshold = self.settings.threshold if request.threshold is None else request.threshold
        least = torch.tensor(self.loaded.least_scores(threshold))

        # 2. Decode in a thread, then detect together with images of other requests.
        loop = asyncio.get_running_loop()
        images = await loop.run_in_executor(self._decoders, self._decode, request)
        detections = await self._batcher(images)
        return {
            "model": self.loaded.origin,
            "detections": [
                self._as_json(each, image.size, least, request.max_detections)
                for each, image in zip(detections, images, strict=True)
            ],
            "threshold": self.loaded.threshold_text(threshold),
        }

    def _decode(self, request: DetectRequest) -> list[PreparedImage]:
        return [self._prepare(image) for image in decode_images(request.images, self.settings.limits.max_pixels)]

    def _prepare(self, image: PIL.Image.Image) -> PreparedImage:
        return PreparedImage(prepare([image], self.loaded.config.input_size), image.size)

    def _forward(self, images: Sequence[PreparedImage]) -> list[Detections]:
        """Detect in a batch, in the batcher's thread; update health and metrics."""
        started_at = time.perf_counter()
        try:
            detections = self._detect(images)
        except Exception:
            self.last_batch_failed = True
            raise
        self.last_batch_failed = False
        observe(self.metrics, "detect_forward_seconds", time.perf_counter() - started_at)
        observe(self.metrics, "detect_batch_images", len(images))
        self.metrics["detect_images_total", ""] += len(images)
        return detections

    def _detect(self, images: Sequence[PreparedImage]) -> list[Detections]:
        pixels, sizes = torch.cat([image.pixels for image in images]), torch.tensor([image.size for image in images])
        batch = self.loaded.detect(pixels, sizes)
        labels, boxes, scores = batch.labels.cpu(), batch.boxes.cpu(), batch.scores.cpu()
        return [Detections(*each) for each in zip(labels, boxes, scores, strict=True)]

    def _as_json(
        self, detections: Detections, size: tuple[int, int], least: Tensor, max_detections: int
    ) -> dict[str, Any]:
        # Detections are sorted, best first.
        kept = (detections.scores >= least[detections.labels]).nonzero().flatten()[:max_detections]
        labels = detections.labels[kept].tolist()
        return {
            "boxes": detections.boxes[kept].tolist(),
            "scores": detections.scores[kept].tolist(),
            "labels": labels,
            "names": [self.loaded.names[label] for label in labels],
            "width": size[0],
            "height": size[1],
        }


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Create a JSON response."""
    return Response(json.dumps(content), status, NOSNIFF | (headers or {}), "application/json")


def error_response(error: RequestError) -> Response:
    """Create the response to a refused request."""
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    field = {} if error.field is None else {"field": error.field}
    return json_response({"error": error.message, **field}, error.status, headers)

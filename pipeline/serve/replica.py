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
from dataclasses import asdict
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from torch import Tensor

from dfine_core.config import PrecisionName
from dfine_core.image_detections import RawDetections
from dfine_core.inference import LoadedDetector
from dfine_core.model.postprocess import MAX_DETECTIONS
from dfine_core.precision import AUTO
from dfine_core.precision_choice import choose_precision
from dfine_core.thresholds import Threshold, wanted_precision
from pipeline.config_keys import Config
from pipeline.errors import ConfigError
from pipeline.open_detector import open_detector
from pipeline.serve.batching import Batcher
from pipeline.serve.decoder_pool import DECODE_LIMIT_S, DecoderPool
from pipeline.serve.decoding import DecodedImage, DecodingJob
from pipeline.serve.metrics import Metrics, observe
from pipeline.serve.proxy import RETRY_AFTER_S
from pipeline.serve.request_error import RequestError
from pipeline.serve.request_parsing import (
    RequestLimits,
    parse_request,
    read_body,
)

logger = logging.getLogger("ray.serve")  # Ray Serve configures its files and level
NOSNIFF = {"X-Content-Type-Options": "nosniff"}
CLIENT_CLOSED_REQUEST = 499  # status of a request whose client disconnected; counted only


def _a_threshold(threshold: Threshold) -> Threshold:
    wanted_precision(threshold)
    return threshold


ServedThreshold = Annotated[Threshold, AfterValidator(_a_threshold)]


class ServeSettings(Config):
    """Detector to serve, and limits of its requests."""

    source: str  # any source of `open_detector`
    threshold: ServedThreshold | None = None  # unless a request has its own; default: the detector's, class by class
    coverage: Annotated[float, Field(gt=0, lt=1)] | None = (
        None  # of intervals, unless a request has its own; None: none
    )
    joint: bool = False  # the coverage is that of boxes with all four edges inside, unless a request says otherwise
    batch_size: PositiveInt = 8  # images per forward pass, at most
    timeout_s: PositiveFloat = 30.0  # per request, from its arrival at a replica to the response
    header_s: PositiveFloat = 10.0  # for the headers of a request to arrive; of the proxy
    body_s: PositiveFloat = 20.0  # for the body to arrive
    decode_s: PositiveFloat = DECODE_LIMIT_S  # for decoding the images of a request
    max_waiting: PositiveInt = 32  # requests in a replica; further ones get status 503
    max_megabytes: PositiveFloat = 20.0  # per request body
    max_images: PositiveInt = 16  # per request
    max_megapixels: PositiveFloat = 50.0  # per request
    replicas: PositiveInt = 1
    precision: PrecisionName = "auto"  # auto: measured at the start; several replicas: float32 in the faster layout
    cpus: PositiveFloat = 1.0  # per replica; also the number of threads of its detector
    gpus: NonNegativeFloat = Field(0.0, description="per replica; a fraction shares one GPU")

    @model_validator(mode="after")
    def _joint_intervals_have_a_coverage(self) -> Self:
        if self.joint and self.coverage is None:
            raise ValueError("joint says what coverage counts: give a coverage, such as 0.9, or leave joint out")
        return self

    @property
    def limits(self) -> RequestLimits:
        """Limits of one request, in bytes and pixels."""
        return RequestLimits(int(self.max_megabytes * 1e6), self.max_images, int(self.max_megapixels * 1e6))


class DetectionService:
    """Service that is ready once constructed: its detector is loaded and has processed an image."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        loaded = open_detector(settings.source, "cuda" if settings.gpus else "cpu", exported=True).deploy()
        self.loaded = loaded.with_precision(_precision_of(loaded, settings))
        self._interval_text(settings.coverage, settings.joint)  # fails now if the detector has no such intervals
        self.metrics: Metrics = Counter()
        self.active_requests = 0
        self.last_batch_failed = False
        self.decoders = DecoderPool(min(4, max(1, int(settings.cpus))), settings.decode_s)
        self._batcher = Batcher(self._forward, settings.batch_size, ThreadPoolExecutor(1, "detect"))
        # On a GPU the largest batch is tried too, so that a lack of memory shows now.
        for images in {1, settings.batch_size} if settings.gpus else {1}:
            self._detect([self._plain_image()] * images)

    async def detect(self, request: Request) -> Response:
        """Return the response to POST /detect, which may be an error."""
        arrived_at = time.perf_counter()
        try:
            response = await self._limited_response(request)
        except RequestError as error:
            response = error_response(error)
        except ClientDisconnect:
            response = Response(status_code=CLIENT_CLOSED_REQUEST)
        except asyncio.CancelledError:  # how Ray Serve ends a request whose client disconnected
            self.metrics["detect_requests_total", str(CLIENT_CLOSED_REQUEST)] += 1
            raise
        except Exception:
            logger.exception("a request failed")
            response = error_response(RequestError(500, "the detector failed; see the log of the server"))
        self.metrics["detect_requests_total", str(response.status_code)] += 1
        observe(self.metrics, "detect_request_seconds", time.perf_counter() - arrived_at)
        return response

    def problem(self) -> str | None:
        """Reason why the server is not ready, without waiting for anything."""
        if self.last_batch_failed:
            return "the last batch failed"
        return f"no image was decoded within {self.settings.decode_s:g} s" if self.decoders.stuck() else None

    async def check_health(self) -> None:
        """Process one image if the last batch failed; raises if the detector still fails."""
        if self.last_batch_failed:
            await self._batcher([self._plain_image()])

    def description(self) -> dict[str, Any]:
        """Content of GET /model."""
        config = self.loaded.config
        return {
            "origin": self.loaded.origin,
            "names": list(self.loaded.names),
            "input_size": list(config.input_size),  # height, width
            "num_queries": config.num_queries,
            "device": str(self.loaded.device),
            "precision": self.loaded.precision,
            "thresholds": list(self.loaded.least_scores(self.settings.threshold)),  # in the order of the names
            "threshold_text": self.loaded.threshold_text(self.settings.threshold),
            "calibration": None if self.loaded.calibration is None else self.loaded.calibration_text(),
            "coverage": self.settings.coverage,
            "joint": self.settings.joint,
            "interval_text": self._interval_text(self.settings.coverage, self.settings.joint),
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
        body = await self._body(http_request)
        content_type = http_request.headers.get("content-type", "")
        request = await parse_request(content_type, http_request.query_params, body, limits)
        threshold = self.settings.threshold if request.threshold is None else request.threshold
        least = torch.tensor(self.loaded.least_scores(threshold))
        coverage = self.settings.coverage if request.coverage is None else request.coverage
        joint = self.settings.joint if request.joint is None else request.joint
        if joint and coverage is None:
            raise RequestError(422, "joint says what coverage counts: give a coverage, such as 0.9", field="joint")
        try:
            interval_text = self._interval_text(coverage, joint)
        except ValueError as error:
            raise RequestError(422, f"{error}", field="coverage") from None

        # 2. Decode in another process, then detect together with images of other requests.
        images = await self.decoders.decode(
            DecodingJob(request.images, limits.max_pixels, self.loaded.config.input_size)
        )
        detections = await self._batcher(images)
        return {
            "model": self.loaded.origin,
            "detections": [
                self._as_json(each, image.size, least, request.max_detections, coverage, joint)
                for each, image in zip(detections, images, strict=True)
            ],
            "threshold": self.loaded.threshold_text(threshold),
            **({} if self.loaded.calibration is None else {"scores": f"calibrated {self.loaded.calibration_text()}"}),
            **({} if interval_text is None else {"intervals": interval_text}),
        }

    def _interval_text(self, coverage: float | None, joint: bool) -> str | None:
        """Text on the intervals of a coverage; a ValueError if the detector has none."""
        return None if coverage is None else self.loaded.edges().text(coverage, joint)

    async def _body(self, request: Request) -> bytes:
        try:
            async with asyncio.timeout(self.settings.body_s):
                return await read_body(request.stream(), request.headers, self.settings.limits.max_bytes)
        except TimeoutError:
            message = f"the body did not arrive within {self.settings.body_s:g} s: send fewer or smaller images"
            raise RequestError(408, message, field="body") from None

    def _plain_image(self) -> DecodedImage:
        return DecodedImage(np.zeros((*self.loaded.config.input_size, 3), np.uint8), (64, 48))

    def _forward(self, images: Sequence[DecodedImage]) -> list[RawDetections]:
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

    def _detect(self, images: Sequence[DecodedImage]) -> list[RawDetections]:
        pixels = torch.from_numpy(np.stack([image.pixels for image in images]).transpose(0, 3, 1, 2).copy())
        return self.loaded.find(pixels, torch.tensor([image.size for image in images]))

    def _as_json(
        self,
        raw: RawDetections,
        size: tuple[int, int],
        least: Tensor,
        max_detections: int,
        coverage: float | None,
        joint: bool,
    ) -> dict[str, Any]:
        found = self.loaded.keep(raw, least, coverage=coverage, joint=joint, limit=max_detections)
        return {
            "boxes": found.boxes.tolist(),
            "scores": found.scores.tolist(),
            "labels": found.labels.tolist(),
            "names": list(found.names),
            "width": size[0],
            "height": size[1],
            **({} if found.edge_std_px is None else {"edge_std_px": found.edge_std_px.tolist()}),
            **({} if found.edge_intervals is None else {"edge_intervals": found.edge_intervals.tolist()}),
        }


def _precision_of(loaded: LoadedDetector, settings: ServeSettings) -> str:
    """Precision of a replica: never one that differs from its neighbour's by a measurement."""
    if settings.precision not in (AUTO, *loaded.precisions):
        raise ConfigError(
            f"{loaded.origin}: the precision of an exported file is fixed; leave out {settings.precision}"
        )
    if settings.precision != AUTO or len(loaded.precisions) == 1:
        return loaded.precisions[0] if settings.precision == AUTO else settings.precision
    if settings.gpus or settings.replicas > 1:
        return "fp32" if settings.gpus else "fp32-channels-last"
    choice = choose_precision(loaded)
    logger.info(choice.line())
    return choice.name


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Create a JSON response."""
    return Response(json.dumps(content), status, NOSNIFF | (headers or {}), "application/json")


def error_response(error: RequestError) -> Response:
    """Create the response to a refused request."""
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if error.status == 408:
        headers["Connection"] = "close"  # the rest of the body would be read otherwise
    field = {} if error.field is None else {"field": error.field}
    return json_response({"error": error.message, **field}, error.status, headers)

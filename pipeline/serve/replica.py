"""A detector behind HTTP, inside one process: requests in, answers out, and what is counted on the way.

`pipeline/serve/deployment.py` puts it on Ray Serve.
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

from dfine_core.inference import DEFAULT_THRESHOLD, prepare
from dfine_core.model.postprocess import MAX_DETECTIONS, Detections
from pipeline.config import Config, Share
from pipeline.open_detector import open_detector
from pipeline.serve.batching import Batcher
from pipeline.serve.metrics import Counts, observe
from pipeline.serve.request_parsing import Asked, Limits, RequestError, decode, parse, read_body

logger = logging.getLogger("ray.serve")  # whose files and level Ray Serve looks after
SAFE = {"X-Content-Type-Options": "nosniff"}
RETRY_AFTER_S = 1
GONE = 499  # the client went away; counted, and heard by nobody


class ServeSettings(Config):
    """What is served, and what a request may cost."""

    source: str  # as jobs.evaluate takes it
    threshold: Share = DEFAULT_THRESHOLD  # where a request names none
    batch: PositiveInt = 8  # images at once
    timeout_s: PositiveFloat = 30.0  # of a request, from its arrival at a replica to its answer
    max_waiting: PositiveInt = 32  # requests inside a replica; more are told to come again
    max_megabytes: PositiveFloat = 20.0  # of a body
    max_images: PositiveInt = 16  # of a request
    max_megapixels: PositiveFloat = 50.0  # of a request
    replicas: PositiveInt = 1
    cpus: PositiveFloat = 1.0  # of a replica, and so the threads of its detector
    gpus: NonNegativeFloat = Field(0.0, description="of a replica; less than one shares it")

    @property
    def limits(self) -> Limits:
        return Limits(int(self.max_megabytes * 1e6), self.max_images, int(self.max_megapixels * 1e6))


@dataclass(frozen=True, eq=False)
class Prepared:
    pixels: Tensor  # [1, 3, H, W] uint8
    size: tuple[int, int]  # width, height before


class Service:
    """Ready when it is made: the detector is loaded, and has seen a picture."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.trained = open_detector(settings.source, "cuda" if settings.gpus else "cpu").deploy()
        self.counts: Counts = Counter()
        self.inside = 0  # requests
        self.failed = False  # the last batch
        self._decoders = ThreadPoolExecutor(min(4, max(1, int(settings.cpus))), "decode")
        self._batcher = Batcher(self._forward, settings.batch, ThreadPoolExecutor(1, "detect"))
        # On a GPU the largest batch too, so that too little memory shows now.
        for images in {1, settings.batch} if settings.gpus else {1}:
            self._detect([self._prepared(PIL.Image.new("RGB", (64, 48)))] * images)

    async def detect(self, request: Request) -> Response:
        """The answer to POST /detect, be it a refusal."""
        arrived = time.perf_counter()
        try:
            response = await self._answered(request)
        except RequestError as refused:
            response = refusal(refused)
        except ClientDisconnect:
            response = Response(status_code=GONE)
        except Exception:
            logger.exception("a request failed")
            response = refusal(RequestError(500, "the detector failed; its log says why"))
        self.counts["detect_requests_total", str(response.status_code)] += 1
        observe(self.counts, "detect_request_seconds", time.perf_counter() - arrived)
        return response

    async def check(self) -> None:
        """After a batch that failed, try one image. Raises: what is still wrong."""
        if self.failed:
            await self._batcher([self._prepared(PIL.Image.new("RGB", (64, 48)))])

    def description(self) -> dict[str, Any]:
        config = self.trained.config
        return {
            "origin": self.trained.origin,
            "names": list(self.trained.names),
            "input_size": list(config.input_size),  # height, width
            "num_queries": config.num_queries,
            "device": str(self.trained.device),
            "threshold": self.settings.threshold,
            "max_detections": MAX_DETECTIONS,
            "batch": self.settings.batch,
            "limits": asdict(self.settings.limits) | {"timeout_s": self.settings.timeout_s},
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        }

    async def _answered(self, request: Request) -> Response:
        if self.inside >= self.settings.max_waiting:
            raise RequestError(
                503, f"busy: {self.inside} requests wait already, come again", retry_after_s=RETRY_AFTER_S
            )
        self.inside += 1
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                return json_response(await self._found(request))
        except TimeoutError:
            message = (
                f"not done within {self.settings.timeout_s:g} s: send fewer or smaller pictures, or come again later"
            )
            raise RequestError(504, message, retry_after_s=RETRY_AFTER_S) from None
        finally:
            self.inside -= 1

    async def _found(self, request: Request) -> dict[str, Any]:
        limits = self.settings.limits
        body = await read_body(request.stream(), request.headers, limits.max_bytes)
        content_type = request.headers.get("content-type", "")
        asked = await parse(content_type, request.query_params, body, limits, self.settings.threshold)
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(self._decoders, self._opened, asked)
        found = await self._batcher(prepared)
        return {
            "model": self.trained.origin,
            "detections": [self._plain(each, image.size, asked) for each, image in zip(found, prepared, strict=True)],
        }

    def _opened(self, asked: Asked) -> list[Prepared]:
        return [self._prepared(image) for image in decode(asked.images, self.settings.limits.max_pixels)]

    def _prepared(self, image: PIL.Image.Image) -> Prepared:
        return Prepared(prepare([image], self.trained.config.input_size), image.size)

    def _forward(self, images: Sequence[Prepared]) -> list[Detections]:
        """Of one image each."""
        started = time.perf_counter()
        try:
            found = self._detect(images)
        except Exception:
            self.failed = True
            raise
        self.failed = False
        observe(self.counts, "detect_forward_seconds", time.perf_counter() - started)
        observe(self.counts, "detect_batch_images", len(images))
        self.counts["detect_images_total", ""] += len(images)
        return found

    def _detect(self, images: Sequence[Prepared]) -> list[Detections]:
        pixels, sizes = torch.cat([image.pixels for image in images]), torch.tensor([image.size for image in images])
        found = self.trained.detect(pixels, sizes)
        labels, boxes, scores = found.labels.cpu(), found.boxes.cpu(), found.scores.cpu()
        return [Detections(*each) for each in zip(labels, boxes, scores, strict=True)]

    def _plain(self, found: Detections, size: tuple[int, int], asked: Asked) -> dict[str, Any]:
        kept = min(int((found.scores >= asked.threshold).sum()), asked.max_detections)  # they are sorted, best first
        labels = found.labels[:kept].tolist()
        return {
            "boxes": found.boxes[:kept].tolist(),
            "scores": found.scores[:kept].tolist(),
            "labels": labels,
            "names": [self.trained.names[label] for label in labels],
            "width": size[0],
            "height": size[1],
        }


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content), status, SAFE | (headers or {}), "application/json")


def refusal(refused: RequestError) -> Response:
    headers = {} if refused.retry_after_s is None else {"Retry-After": str(refused.retry_after_s)}
    field = {} if refused.field is None else {"field": refused.field}
    return json_response({"error": refused.message, **field}, refused.status, headers)

"""Parse and validate detection requests; every limit is enforced before decoding.

The body of a request is a form, JSON, or a single image. Nothing in it is ever used as a path or URL.
"""

import asyncio
import base64
from collections.abc import AsyncGenerator, AsyncIterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from dfine_core.model.postprocess import MAX_DETECTIONS
from pipeline.serve.decoding import EncodedImage
from pipeline.serve.request_error import RequestError

OPTIONS = ("threshold", "max_detections", "coverage", "joint")
BODY_FORMATS = (
    "a form with files named image, JSON with a list named images, or one image with its own type, such as image/jpeg"
)

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class RequestLimits:
    """Limits of one request."""

    max_bytes: int = 20 * 2**20
    max_images: int = 16
    max_pixels: int = 50_000_000  # over all images, counted before the first is decoded


@dataclass(frozen=True)
class DetectRequest:
    """Parsed request: images, still encoded, and options."""

    images: tuple[EncodedImage, ...]
    threshold: float | None  # None: that of the server
    max_detections: int  # per image
    coverage: float | None = None  # of the intervals of edges; None: that of the server
    joint: bool | None = None  # the coverage is that of boxes with all four edges inside; None: as the server has it


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    threshold: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    max_detections: int = Field(MAX_DETECTIONS, ge=1, le=MAX_DETECTIONS)
    coverage: float | None = Field(None, gt=0, lt=1, allow_inf_nan=False)
    joint: bool | None = None


class _Body(_Options):
    images: list[StrictStr]


async def read_body(chunks: AsyncIterable[bytes], headers: Mapping[str, str], max_bytes: int) -> bytes:
    """Read the whole body. It is refused unread if its declared length exceeds `max_bytes`, else where it does.

    Args:
        chunks: chunks of the body in the order of arrival.
        headers: HTTP headers with lower-case names.
    """
    if headers.get("content-encoding", "identity") != "identity":
        raise RequestError(415, "the body must not be compressed: send it uncompressed", field="Content-Encoding")
    too_long = RequestError(413, f"the body exceeds {max_bytes:,} bytes: send fewer or smaller images", field="body")
    if int(headers.get("content-length", 0)) > max_bytes:
        raise too_long
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > max_bytes:
            raise too_long
    return bytes(body)


async def parse_request(
    content_type: str, query: Mapping[str, str], body: bytes, limits: RequestLimits
) -> DetectRequest:
    """Parse a request. Options are in the query, or in the form or JSON next to the images, which takes precedence.

    Raises:
        RequestError: 415 for another type of content, 422 for an invalid value, 413 for too many images.
    """
    kind = parse_options_header(content_type)[0].decode("latin-1").lower()
    options: Mapping[str, Any] = query
    if kind == "application/json":
        # In threads: the event loop answers other requests meanwhile.
        images, in_body = await asyncio.to_thread(_from_json, body, limits.max_images)
        options = {**query, **in_body}
    elif kind == "multipart/form-data":
        images, in_body = await asyncio.to_thread(asyncio.run, _from_form(content_type, body, limits.max_images))
        options = {**query, **in_body}
    elif kind.startswith("image/"):
        images = (EncodedImage("body", body),)
    else:
        raise RequestError(
            415, f"cannot read {kind or 'a body without a type'}: send {BODY_FORMATS}", field="Content-Type"
        )
    if not images:
        raise RequestError(422, f"the request contains no image: send {BODY_FORMATS}", field="image")
    _refuse_too_many(len(images), limits.max_images)
    valid = _validated(_Options, options)
    return DetectRequest(images, valid.threshold, valid.max_detections, valid.coverage, valid.joint)


def _refuse_too_many(images: int, limit: int) -> None:
    if images > limit:
        raise RequestError(413, f"{images} images exceed the limit of {limit} per request: send several requests")


def _from_json(body: bytes, max_images: int) -> tuple[tuple[EncodedImage, ...], dict[str, Any]]:
    # Values are counted before they become objects, images before they are decoded. A data: URL has a comma of its own.
    if body.count(b",") > 2 * max_images + len(OPTIONS):
        raise RequestError(413, f"more than {max_images} images per request: send several requests")
    valid = _validated(_Body, body)
    _refuse_too_many(len(valid.images), max_images)
    images = tuple(_from_base64(f"images[{n}]", text) for n, text in enumerate(valid.images))
    return images, valid.model_dump(include=set(OPTIONS), exclude_unset=True)


def _from_base64(field: str, text: str) -> EncodedImage:
    try:
        return EncodedImage(field, base64.b64decode(text, validate=True))
    except ValueError:
        way_out = "remove everything up to the comma" if text.startswith("data:") else "paths and URLs are not opened"
        raise RequestError(422, f"not a base64-encoded image: {way_out}", field=field) from None


async def _from_form(
    content_type: str, body: bytes, max_images: int
) -> tuple[tuple[EncodedImage, ...], dict[str, str]]:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    headers = Headers({"content-type": content_type})
    try:
        # One file more than allowed, so that too many images give the same error in every format.
        parser = MultiPartParser(headers, stream(), max_files=max_images + 1, max_fields=len(OPTIONS) + max_images)
        parser.spool_max_size = len(body) + 1  # keep it in memory, where the body already is
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise RequestError(413, f"more than {max_images} images per request: send several requests") from None
        raise RequestError(422, f"the form cannot be read: {error.message}", field="body") from None
    try:
        images: list[EncodedImage] = []
        options: dict[str, str] = {}
        for name, value in form.multi_items():
            if isinstance(value, UploadFile) != (name == "image"):
                raise RequestError(422, f"a form takes files named image, and {', '.join(OPTIONS)} as text", field=name)
            if isinstance(value, UploadFile):
                images.append(EncodedImage(f"image[{len(images)}]", await value.read()))
            else:
                options[name] = value
        return tuple(images), options
    finally:
        await form.close()


def _validated(kind: type[M], content: bytes | Mapping[str, Any]) -> M:
    try:
        return kind.model_validate_json(content) if isinstance(content, bytes) else kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = "".join(f"[{part}]" if isinstance(part, int) else str(part) for part in first["loc"]) or "body"
        known = f"; known: {', '.join(kind.model_fields)}" if first["type"] in ("extra_forbidden", "missing") else ""
        raise RequestError(422, f"{first['msg']}{known}", field=field) from None

"""What a client may ask the server for: taken apart, checked, and bounded before any pixel is decoded.

A request is a form, JSON or one image as it is. Nothing in it is ever used as a path or an address.
"""

import base64
from collections.abc import AsyncGenerator, AsyncIterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import PIL.Image
from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from dfine_core.images import FORMATS, ImageError, TooManyPixelsError, open_image, read_image
from dfine_core.model.postprocess import MAX_DETECTIONS
from pipeline.errors import UserError

OPTIONS = ("threshold", "max_detections")
FORMS = (
    "a form with files named image, JSON with a list named images, or one picture with its own type, such as image/jpeg"
)


M = TypeVar("M", bound=BaseModel)


class RequestError(UserError):
    """A request that is not answered, and why: a sentence with the way out.

    Args:
        status: of HTTP.
        field: what of the request is meant, such as `images[2]`.
        retry_after_s: when to ask again.
    """

    def __init__(
        self, status: int, message: str, *, field: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.retry_after_s = status, message, field, retry_after_s


@dataclass(frozen=True)
class Limits:
    """Of one request."""

    max_bytes: int = 20 * 2**20
    max_images: int = 16
    max_pixels: int = 50_000_000  # of all pictures together, counted before the first is decoded


@dataclass(frozen=True)
class Encoded:
    """A picture as it came."""

    field: str  # what the request calls it
    content: bytes


@dataclass(frozen=True)
class Asked:
    images: tuple[Encoded, ...]
    threshold: float
    max_detections: int  # of each image


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    threshold: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    max_detections: int = Field(MAX_DETECTIONS, ge=1, le=MAX_DETECTIONS)


class _Body(_Options):
    images: list[StrictStr]


async def read_body(chunks: AsyncIterable[bytes], headers: Mapping[str, str], max_bytes: int) -> bytes:
    """The whole body. One that says it is longer than `max_bytes` is refused unread, any other where it gets longer.

    Args:
        chunks: of the body, as they come.
        headers: with names in lower case.
    """
    if headers.get("content-encoding", "identity") != "identity":
        raise RequestError(415, "the body must not be compressed: send it as it is", field="Content-Encoding")
    too_long = RequestError(413, f"the body exceeds {max_bytes:,} bytes: send fewer or smaller pictures", field="body")
    if int(headers.get("content-length", 0)) > max_bytes:
        raise too_long
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > max_bytes:
            raise too_long
    return bytes(body)


async def parse(
    content_type: str, query: Mapping[str, str], body: bytes, limits: Limits, default_threshold: float
) -> Asked:
    """Options stand in the query, or beside the pictures in a form or JSON; there they win.

    Raises:
        RequestError: 415 for another type of content, 422 for a wrong value, 413 for too many pictures.
    """
    kind = parse_options_header(content_type)[0].decode("latin-1").lower()
    options: Mapping[str, Any] = query
    if kind == "application/json":
        images, given = _from_json(body)
        options = {**query, **given}
    elif kind == "multipart/form-data":
        images, given = await _from_form(content_type, body, limits.max_images)
        options = {**query, **given}
    elif kind.startswith("image/"):
        images = (Encoded("body", body),)
    else:
        raise RequestError(415, f"cannot read {kind or 'a body without a type'}: send {FORMS}", field="Content-Type")
    if not images:
        raise RequestError(422, f"there is no picture in it: send {FORMS}", field="image")
    if len(images) > limits.max_images:
        raise RequestError(413, f"{len(images)} pictures exceed the {limits.max_images} of a request: send several")
    checked = _checked(_Options, options)
    threshold = default_threshold if checked.threshold is None else checked.threshold
    return Asked(images, threshold, checked.max_detections)


def decode(images: Sequence[Encoded], max_pixels: int) -> list[PIL.Image.Image]:
    """In RGB. The pixels of all are counted from their headers before the first is decoded.

    Raises:
        RequestError: 413 for more than `max_pixels` together, 415 for what is no picture, 422 for a broken one.
    """
    pixels = 0
    for image in images:
        width, height = _size(image)
        pixels += width * height
        if pixels > max_pixels:
            so_far = "with those before it, " if image is not images[0] else ""
            raise RequestError(
                413,
                f"{so_far}{width} x {height} pixels exceed the {max_pixels:,} of a request: scale it down",
                field=image.field,
            )
    return [_decoded(image) for image in images]


def _size(image: Encoded) -> tuple[int, int]:
    try:
        with open_image(image.content) as opened:
            return opened.size
    except TooManyPixelsError:
        raise RequestError(413, "far too many pixels: scale it down", field=image.field) from None
    except ImageError:
        known = ", ".join(FORMATS)
        raise RequestError(
            415, f"this is no picture that can be read: send one of {known}", field=image.field
        ) from None


def _decoded(image: Encoded) -> PIL.Image.Image:
    try:
        return read_image(image.content)
    except ValueError as error:
        raise RequestError(422, f"{error}: save it anew", field=image.field) from None


def _from_json(body: bytes) -> tuple[tuple[Encoded, ...], dict[str, Any]]:
    checked = _checked(_Body, body)
    images = tuple(_from_base64(f"images[{n}]", text) for n, text in enumerate(checked.images))
    return images, checked.model_dump(include=set(OPTIONS), exclude_unset=True)


def _from_base64(field: str, text: str) -> Encoded:
    try:
        return Encoded(field, base64.b64decode(text, validate=True))
    except ValueError:
        way_out = "leave out all up to the comma" if text.startswith("data:") else "paths and addresses are not opened"
        raise RequestError(422, f"this is not the base64 text of a picture: {way_out}", field=field) from None


async def _from_form(content_type: str, body: bytes, max_images: int) -> tuple[tuple[Encoded, ...], dict[str, str]]:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    headers = Headers({"content-type": content_type})
    try:
        # One file more than allowed, so that the answer to too many is the same for every form of request.
        parser = MultiPartParser(headers, stream(), max_files=max_images + 1, max_fields=len(OPTIONS) + max_images)
        parser.spool_max_size = len(body) + 1  # in memory, where the body is already
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise RequestError(413, f"more than the {max_images} pictures of a request: send several") from None
        raise RequestError(422, f"the form cannot be read: {error.message}", field="body") from None
    try:
        images: list[Encoded] = []
        options: dict[str, str] = {}
        for name, value in form.multi_items():
            if isinstance(value, UploadFile) != (name == "image"):
                raise RequestError(
                    422, f"a form has files named image, and {' and '.join(OPTIONS)} as text", field=name
                )
            if isinstance(value, UploadFile):
                images.append(Encoded(f"image[{len(images)}]", await value.read()))
            else:
                options[name] = value
        return tuple(images), options
    finally:
        await form.close()


def _checked(kind: type[M], content: bytes | Mapping[str, Any]) -> M:
    try:
        return kind.model_validate_json(content) if isinstance(content, bytes) else kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = "".join(f"[{part}]" if isinstance(part, int) else str(part) for part in first["loc"]) or "body"
        known = f"; known: {', '.join(kind.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise RequestError(422, f"{first['msg']}{known}", field=field) from None

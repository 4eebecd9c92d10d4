"""Decode the images of a request, in a process of its own that `decoder_pool.py` starts and may kill.

The process imports neither torch nor Ray, and takes no more memory than NumPy and Pillow do. It receives a job as JSON and the
encoded images, and returns JSON and the pixels of each image.
"""

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from dfine_core.images import (
    FORMATS,
    ImageError,
    TooManyPixelsError,
    TooMuchWorkError,
    open_image,
    read_image,
    stretch_image,
)
from pipeline.serve.request_error import RequestError

READY = b"ready"
ORPHAN_S = 5  # a decoder whose server is gone ends itself so much after the time limit


@dataclass(frozen=True)
class EncodedImage:
    """Image as received."""

    field: str  # name of its field in the request
    content: bytes


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """Image stretched to the input size of the detector."""

    pixels: NDArray[np.uint8]  # [H, W, 3] RGB
    size: tuple[int, int]  # width, height of the original image


@dataclass(frozen=True)
class DecodingJob:
    """Images of one request, and limits."""

    images: tuple[EncodedImage, ...]
    max_pixels: int  # over all images
    input_size: tuple[int, int]  # height, width


def decode_images(images: Sequence[EncodedImage], max_pixels: int) -> list[PIL.Image.Image]:
    """Decode to RGB. The pixels of all images are counted from their headers before the first is decoded.

    Raises:
        RequestError: 413 for more than `max_pixels` in total or too much work, 415 for an unknown format, 422 for a broken image.
    """
    pixels = 0
    for image in images:
        width, height = _size(image)
        pixels += width * height
        if pixels > max_pixels:
            so_far = "with the images before it, " if image is not images[0] else ""
            raise RequestError(
                413,
                f"{so_far}{width} x {height} pixels exceed the limit of {max_pixels:,} per request: scale it down",
                field=image.field,
            )
    return [_decoded(image) for image in images]


def send_job(connection: Connection, job: DecodingJob, limit_s: float) -> None:
    """Send a job to a decoder."""
    fields = [image.field for image in job.images]
    head = {"fields": fields, "max_pixels": job.max_pixels, "input_size": job.input_size, "limit_s": limit_s}
    connection.send_bytes(json.dumps(head).encode())
    for image in job.images:
        connection.send_bytes(image.content)


def receive_result(connection: Connection, input_size: tuple[int, int]) -> list[DecodedImage]:
    """Receive the result of a job; raises its RequestError."""
    head = json.loads(connection.recv_bytes())
    if "error" in head:
        raise RequestError(head["status"], head["error"], field=head["field"])
    return [
        DecodedImage(np.frombuffer(connection.recv_bytes(), np.uint8).reshape(*input_size, 3), (width, height))
        for width, height in head["sizes"]
    ]


def work(connection: Connection) -> None:
    """Decode job after job until the server closes the connection."""
    try:
        connection.send_bytes(READY)
        while True:
            head = json.loads(connection.recv_bytes())
            images = [EncodedImage(field, connection.recv_bytes()) for field in head["fields"]]
            signal.alarm(int(head["limit_s"]) + ORPHAN_S)  # its default action ends the process, in whatever code it is
            for part in _result(images, head["max_pixels"], head["input_size"]):
                connection.send_bytes(part)
            signal.alarm(0)
    except (EOFError, OSError):  # the server ended
        return


def _result(images: Sequence[EncodedImage], max_pixels: int, input_size: tuple[int, int]) -> list[bytes]:
    try:
        decoded = decode_images(images, max_pixels)
    except RequestError as error:
        return [json.dumps({"error": error.message, "status": error.status, "field": error.field}).encode()]
    sizes = [image.size for image in decoded]
    return [json.dumps({"sizes": sizes}).encode(), *(stretch_image(image, input_size).tobytes() for image in decoded)]


def _size(image: EncodedImage) -> tuple[int, int]:
    try:
        with open_image(image.content) as opened:
            return opened.size
    except TooManyPixelsError:
        raise RequestError(413, "far too many pixels: scale it down", field=image.field) from None
    except TooMuchWorkError as error:
        raise RequestError(413, f"{error}", field=image.field) from None
    except ImageError:
        known = ", ".join(FORMATS)
        raise RequestError(415, f"not an image in a known format: send one of {known}", field=image.field) from None


def _decoded(image: EncodedImage) -> PIL.Image.Image:
    try:
        return read_image(image.content)
    except ValueError as error:
        raise RequestError(422, f"{error}: save it again", field=image.field) from None


if __name__ == "__main__":
    work(Connection(int(sys.argv[1])))

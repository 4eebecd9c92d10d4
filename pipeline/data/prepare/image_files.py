"""Read and check image files for a shard; resize or rotate them where that is asked for.

The bytes stay unchanged unless an image is resized, or its annotation refers to the EXIF-rotated image. Readers of shards
therefore ignore EXIF.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import simplejpeg
from PIL import Image, ImageOps

from dfine_core.images import TooManyPixelsError, open_image, to_rgb
from pipeline import storage
from pipeline.data.sources import synthetic
from pipeline.errors import UserError

EXIF_ORIENTATION = 0x0112
UPRIGHT_QUALITY = 95  # JPEG quality of images that are re-encoded only to rotate them

T = TypeVar("T")


class BadImageError(UserError, ValueError):
    """An image that cannot go into a shard: a short reason, the same for all cases of a kind, and the details."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class EncodedImage:
    """An image as it is stored, and the image size that its boxes were annotated in."""

    data: bytes
    width: int
    height: int
    annotated_width: int
    annotated_height: int


def read_image_file(uri: str) -> bytes:
    """Read the bytes of an image by path or URI; a synthetic image is rendered.

    Raises:
        BadImageError: the file does not exist. Other errors of the storage are not caught.
    """
    try:
        if uri.startswith(synthetic.SCHEME):
            return synthetic.render_uri(uri)
        if "://" not in uri:
            with open(uri, "rb") as file:  # by far the fastest way to read a small local file
                return file.read()
        return storage.read_bytes(uri)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise BadImageError("missing file", uri) from None


def checked_image(
    data: bytes,
    annotated_size: tuple[int, int] | None,
    *,
    longest_side: int | None,
    quality: int,
    max_pixels: int,
    verify: bool,
) -> EncodedImage:
    """Check an image, as far as possible without decoding it, and return what to store.

    Args:
        annotated_size: (width, height) in the annotation, None if it has none.
        longest_side: larger images are reduced to this with a Lanczos filter; None keeps all sizes.
        quality: JPEG quality of resized images.
        max_pixels: larger images are rejected by their header, before anything is decoded.
        verify: decode every image, to find truncated ones.

    Raises:
        BadImageError: not an image, too large, damaged, or not of the annotated size.
    """
    width, height = _header_size(data)
    if width * height > max_pixels:
        raise BadImageError("too many pixels", f"{width} x {height} are more than {max_pixels}")
    turned = annotated_size in (None, (height, width)) and annotated_size != (width, height) and _exif_swaps_sides(data)
    upright_size = (height, width) if turned else (width, height)
    if annotated_size not in (None, upright_size):
        raise BadImageError(
            "size mismatch", f"annotated as {annotated_size}, the file is {(width, height)} (width, height)"
        )
    if longest_side is not None and max(upright_size) > longest_side:
        return _reencode(data, upright_size, turned, longest_side, quality)
    if turned:
        return _reencode(data, upright_size, turned, max(upright_size), UPRIGHT_QUALITY)
    if verify:
        _verify(data)
    return EncodedImage(data, width, height, width, height)


def _is_jpeg(data: bytes) -> bool:
    return data.startswith(b"\xff\xd8")


def _header_size(data: bytes) -> tuple[int, int]:
    """Width and height from the header."""
    if _is_jpeg(data):
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            return width, height
        except ValueError:
            pass  # Pillow reads more kinds of JPEG, and its errors are clearer
    return _with_pillow(data, lambda image: image.size)


def _exif_swaps_sides(data: bytes) -> bool:
    """True if the EXIF orientation exchanges width and height."""
    return _with_pillow(data, lambda image: image.getexif().get(EXIF_ORIENTATION, 1)) in (5, 6, 7, 8)


def _verify(data: bytes) -> None:
    """Decode the whole file, without keeping the pixels."""
    if _is_jpeg(data):
        try:
            # Grey at an eighth of the size still reads the whole file, in less than half the time.
            simplejpeg.decode_jpeg(data, colorspace="GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
            return
        except ValueError:
            pass  # strict mode rejects harmless bytes too; Pillow decides: it only requires that no pixel is missing
    _with_pillow(data, lambda image: image.load())


def _reencode(
    data: bytes, upright_size: tuple[int, int], turned: bool, longest_side: int, quality: int
) -> EncodedImage:
    # Sizes are rounded down, as in the data that the released models were trained on.
    width, height = (max(1, side * longest_side // max(upright_size)) for side in upright_size)

    def write(image: Image.Image) -> bytes:
        upright = ImageOps.exif_transpose(image) if turned else image
        rgb = to_rgb(upright)
        resized = rgb if rgb.size == (width, height) else rgb.resize((width, height), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        resized.save(buffer, "JPEG", quality=quality)
        return buffer.getvalue()

    return EncodedImage(_with_pillow(data, write), width, height, *upright_size)


def _with_pillow(data: bytes, use: Callable[[Image.Image], T]) -> T:
    try:
        with open_image(data, max_pixels=None) as image:  # checked against the limit of `prepare`
            return use(image)
    except TooManyPixelsError as error:
        raise BadImageError("too many pixels", str(error)) from None
    except (OSError, ValueError, SyntaxError) as error:  # SyntaxError is Pillow's for a broken PNG
        raise BadImageError("undecodable", str(error) or type(error).__name__) from None

"""Read and check image files for a shard; resize them, or turn them upright by their EXIF orientation.

The bytes stay unchanged unless an image is resized or turned. Readers of shards therefore ignore EXIF. The annotated size
decides whether a marked image was annotated upright. Where it fits both ways (half turns, mirrored and square images, sources
without sizes), the image is turned, because labelling tools show it upright.
"""

import errno
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import simplejpeg
from PIL import Image

from dfine_core.images import (
    PIXEL_LIMIT,
    SIDES_SWAPPED,
    TooManyPixelsError,
    check_levels,
    open_image,
    orientation,
    to_rgb,
)
from pipeline import storage
from pipeline.data.sources import synthetic
from pipeline.errors import UserError

UNREADABLE = frozenset({errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EIO})  # a fault of one local file
UPRIGHT_QUALITY = 95  # JPEG quality of images that are re-encoded only to rotate them

ExifRule = Literal["upright", "ignore"]  # what annotations refer to: the image as viewers show it, or the stored pixels
ExifNotice = Literal["exif-turned", "exif-undecided", "exif-kept"]

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
    exif: ExifNotice | None = None  # handling of an image that is marked as turned


def read_image_file(uri: str) -> bytes:
    """Read the bytes of an image by path or URI; a synthetic image is rendered.

    Raises:
        BadImageError: the file does not exist, or its name or rights do not let it be read. Failures of a network are not
            caught: they must not empty a data set.
    """
    try:
        if uri.startswith(synthetic.SCHEME):
            return synthetic.render_uri(uri)
        if "://" not in uri:
            return storage.read_regular_file(uri)  # by far the fastest way to read a small local file
        return storage.read_bytes(uri)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise BadImageError("missing file", uri) from None
    except (storage.StorageError, PermissionError, ValueError) as error:  # ValueError: a NUL, half of a surrogate pair
        raise BadImageError("unreadable file", f"{error}") from None
    except OSError as error:
        if error.errno in UNREADABLE:
            raise BadImageError("unreadable file", f"{uri}: {error.strerror}") from None
        raise


def checked_image(
    data: bytes,
    annotated_size: tuple[int, int] | None,
    *,
    longest_side: int | None,
    quality: int,
    max_pixels: int,
    verify: bool,
    exif: ExifRule = "upright",
) -> EncodedImage:
    """Check an image, as far as possible without decoding it, and return what to store.

    Args:
        annotated_size: (width, height) in the annotation, None if it has none.
        longest_side: larger images are reduced to this with a Lanczos filter; None keeps all sizes.
        quality: JPEG quality of resized images.
        max_pixels: larger images are rejected by their header, before anything is decoded.
        verify: decode every image, to find truncated ones.
        exif: "ignore" turns no image.

    Raises:
        BadImageError: not an image, too large, damaged, not of the annotated size, or of a kind that training cannot read.
    """
    stored = _header_size(data)
    if stored[0] * stored[1] > max_pixels:
        raise BadImageError("too many pixels", f"{stored[0]} x {stored[1]} are more than {max_pixels}")
    mark = _orientation(data) if exif == "upright" else 1
    upright_size = stored[::-1] if mark in SIDES_SWAPPED else stored
    notice = _exif_notice(mark, stored, upright_size, annotated_size)
    turned = notice in ("exif-turned", "exif-undecided")
    size = upright_size if turned else stored
    if annotated_size not in (None, size):
        raise BadImageError("size mismatch", f"annotated as {annotated_size}, the file is {stored} (width, height)")
    side = min(max(size), longest_side or max(size))
    if side < max(size) or turned:
        image = _reencode(data, size, turned, side, quality if side < max(size) else UPRIGHT_QUALITY, notice)
    else:
        _check(data, verify)
        image = EncodedImage(data, *size, *size, notice)
    if image.width * image.height > PIXEL_LIMIT:
        detail = f"{image.width} x {image.height}: training reads {PIXEL_LIMIT:,} at most; take --longest-side too"
        raise BadImageError("too many pixels", detail)
    return image


def _exif_notice(
    mark: int, stored: tuple[int, int], upright: tuple[int, int], annotated: tuple[int, int] | None
) -> ExifNotice | None:
    """Decide by the annotated size whether an image with an orientation mark was annotated upright."""
    if mark == 1:
        return None
    if annotated is None or upright == stored:
        return "exif-undecided"
    return "exif-kept" if annotated == stored else "exif-turned"


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


def _orientation(data: bytes) -> int:
    return _with_pillow(data, orientation)


def _check(data: bytes, verify: bool) -> None:
    """Check that training can read the image, by its header alone or by decoding the whole file."""
    if _is_jpeg(data):
        try:
            # Grey at an eighth of the size still reads the whole file, in less than half the time.
            if verify:
                simplejpeg.decode_jpeg(data, colorspace="GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
            return
        except ValueError:
            pass  # strict mode rejects harmless bytes too; Pillow decides: it only requires that no pixel is missing
    _with_pillow(data, lambda image: to_rgb(image) if verify else check_levels(image))


def _reencode(
    data: bytes, size: tuple[int, int], upright: bool, longest_side: int, quality: int, notice: ExifNotice | None
) -> EncodedImage:
    # Sizes are rounded down, as in the data that the released models were trained on.
    width, height = (max(1, side * longest_side // max(size)) for side in size)

    def write(image: Image.Image) -> bytes:
        rgb = to_rgb(image, upright=upright)
        resized = rgb if rgb.size == (width, height) else rgb.resize((width, height), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        resized.save(buffer, "JPEG", quality=quality)
        return buffer.getvalue()

    return EncodedImage(_with_pillow(data, write), width, height, *size, notice)


def _with_pillow(data: bytes, use: Callable[[Image.Image], T]) -> T:
    try:
        with open_image(data, max_pixels=None) as image:  # checked against the limit of `prepare`
            return use(image)
    except TooManyPixelsError as error:
        raise BadImageError("too many pixels", str(error)) from None
    except (OSError, ValueError, SyntaxError) as error:  # SyntaxError is Pillow's for a broken PNG
        raise BadImageError("undecodable", str(error) or type(error).__name__) from None

"""Images from untrusted sources: the only opener in the project, and the conversion to RGB.

Format and size are checked by the header, before any pixel is decoded. Images are turned upright by their EXIF orientation, as
every viewer shows them; only those of a shard set are not, because `prepare` has turned them. Needs NumPy and Pillow alone, so
that data tasks start without torch.
"""

import base64
import io
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from dfine_core.image_work import excessive_decoding, excessive_structure

PIXEL_LIMIT = 89_478_485  # per image; 256 MiB as RGB, where Pillow too begins to suspect a decompression bomb
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # some of Pillow's other formats start programs

# Endings of files in these formats, for whoever lists folders; the opener itself looks at the content.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
EXIF_ORIENTATION = 0x0112
SIDES_SWAPPED = frozenset({5, 6, 7, 8})  # orientations that exchange width and height
_TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
RANGED_FORMATS = ("PNG", "PPM")  # Pillow's mode I holds 0..65535 for these, and anything for others

# A path, an encoded image or its base64 text, an array [H, W, 3] of uint8 RGB, or an opened image.
ImageSource: TypeAlias = str | os.PathLike[str] | bytes | NDArray[Any] | list[Any] | PIL.Image.Image
OpenedImage: TypeAlias = PIL.Image.Image


class ImageError(ValueError):
    """Reason why an image cannot be used."""


class TooMuchWorkError(ImageError):
    """Error of an image that would take far more work to read than its bytes and pixels suggest, see `image_work.py`."""


class UnknownFormatError(ImageError):
    """Error of bytes that are not an image, or one of a format outside `FORMATS`."""


class TooManyPixelsError(ImageError):
    """Error of an image that is larger than the limit by its header."""


def open_image(source: bytes | str | os.PathLike[str], *, max_pixels: int | None = PIXEL_LIMIT) -> OpenedImage:
    """Open an encoded image or a file by its header; no pixel is decoded yet.

    Args:
        max_pixels: None leaves the check to the caller; Pillow refuses twice `PIXEL_LIMIT` in any case.

    Raises:
        UnknownFormatError, TooManyPixelsError, TooMuchWorkError, ImageError: with the reason.
    """
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        if reason := excessive_structure(content):
            raise TooMuchWorkError(reason)
        image = PIL.Image.open(io.BytesIO(content), formats=FORMATS)
    except TooMuchWorkError:
        raise
    except PIL.UnidentifiedImageError:
        name = _name_of_other_format(content[:16])
        reason = f"its format seems to be {name}" if name else "cannot identify its format"
        raise UnknownFormatError(f"an image cannot be opened: {reason}; only {', '.join(FORMATS)} are read") from None
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise TooManyPixelsError(f"an image cannot be opened: {error}") from None
    except Exception as error:  # each of Pillow's formats raises errors of its own
        raise ImageError(f"an image cannot be opened: {error}") from error
    try:
        if max_pixels is not None:
            check_pixels(image.width, image.height, max_pixels)
        if reason := excessive_decoding(image, content):
            raise TooMuchWorkError(reason)
    except ImageError:
        image.close()
        raise
    except Exception as error:  # a TIFF's tags may hold anything
        image.close()
        raise ImageError(f"an image cannot be opened: {error}") from error
    return image


def check_pixels(width: int, height: int, max_pixels: int = PIXEL_LIMIT) -> None:
    """Raise TooManyPixelsError for an image that is too large to decode."""
    if width * height > max_pixels:
        raise TooManyPixelsError(f"an image of {width}x{height} pixels exceeds the limit of {max_pixels}")


def orientation(image: OpenedImage) -> int:
    """EXIF orientation, 1 to 8: how the pixels must be turned to be upright; 1 leaves them as they are.

    An image without the mark, with a damaged one, or in memory has 1. So has a TIFF, which Pillow turns by itself.
    """
    if image.format in (None, "TIFF"):
        return 1
    try:
        value = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - damaged EXIF raises anything, and viewers then show the pixels as stored
        return 1
    return value if value in _TURNS else 1


def check_levels(image: OpenedImage) -> None:
    """Raise ImageError for levels whose range is unknown: 32-bit integers and floats."""
    if image.mode == "F" or (image.mode == "I" and image.format not in RANGED_FORMATS):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise ImageError(f"an image of mode {image.mode}, levels of unknown range ({kind}); convert it to 8 or 16 bits")


def to_rgb(image: OpenedImage, *, upright: bool = True) -> OpenedImage:
    """Decode to RGB: 16-bit levels lose their lower byte, an alpha channel is dropped.

    Args:
        upright: turn by the EXIF orientation; False for images of a shard set, whose boxes are in the pixels as stored.

    Raises:
        ImageError: the image is broken, or its levels have no known range.
    """
    check_levels(image)
    try:
        image.load()
        turn = _TURNS.get(orientation(image)) if upright else None
        if image.mode == "I" or image.mode.startswith("I;16"):
            rgb = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        else:
            # By way of RGBA, because Pillow warns when a palette loses its transparency on the way to RGB.
            rgb = (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
        return rgb if turn is None else rgb.transpose(turn)
    except Exception as error:  # each of Pillow's formats raises errors of its own
        raise ImageError(f"a broken {image.format} image: {error}") from error


def read_image(value: ImageSource, *, upright: bool = True) -> OpenedImage:
    """Decode one image to RGB.

    Args:
        value: a list is an array as JSON has it, [H][W][3]. Pixels in memory are taken as they are: arrays, and Pillow images
            that are no opened file.
        upright: turn a file by its EXIF orientation, see `to_rgb`.

    Raises:
        ImageError: it is not an image, is broken or has too many pixels; the message names what was given.
    """
    if isinstance(value, PIL.Image.Image):
        check_pixels(value.width, value.height)
        return to_rgb(value, upright=upright)
    if isinstance(value, np.ndarray | list):
        return _from_array(np.asarray(value))
    if isinstance(value, str) and not os.path.isfile(value):
        try:
            value = base64.b64decode(value, validate=True)
        except ValueError:  # binascii.Error is one
            raise ImageError(f"image {value[:80]!r} is neither a file here nor base64 text") from None
    if not isinstance(value, str | os.PathLike | bytes):
        raise ImageError(f"an image is a path, bytes, an array or a Pillow image, not {type(value).__name__}")
    with open_image(value) as image:
        return to_rgb(image, upright=upright)


def as_list(images: Sequence[ImageSource] | ImageSource) -> list[ImageSource]:
    """Return several images as a list, a single one as a list of one."""
    single = isinstance(images, str | bytes | os.PathLike | PIL.Image.Image)
    if single or (isinstance(images, np.ndarray) and images.ndim < 4):
        return [images]  # type: ignore[list-item]
    return list(images)  # type: ignore[arg-type]


def stretch_image(image: OpenedImage, input_size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize the whole RGB image by Pillow's antialiased bilinear filter, as in the released evaluation: [H, W, 3].

    Args:
        input_size: (height, width).
    """
    height, width = input_size
    return np.array(image.resize((width, height), PIL.Image.Resampling.BILINEAR))


def _from_array(pixels: NDArray[Any]) -> OpenedImage:
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0 or pixels.dtype.kind not in "iu":
        raise ImageError(f"an image array must be [H, W, 3] of uint8, got {list(pixels.shape)} of {pixels.dtype}")
    if pixels.min() < 0 or pixels.max() > 255:
        raise ImageError(f"an image array must hold 0..255, got {pixels.min()}..{pixels.max()}")
    return PIL.Image.fromarray(pixels.astype(np.uint8))


def _name_of_other_format(head: bytes) -> str | None:
    """Name of a format outside `FORMATS` by the first bytes, which may fit several; no reader of it is run."""
    PIL.Image.init()  # registers all formats
    for name in PIL.Image.ID:
        accepts = PIL.Image.OPEN[name][1]
        try:
            if name not in FORMATS and accepts is not None and accepts(head):
                return name
        except (IndexError, TypeError, struct.error):  # too few bytes
            continue
    return None

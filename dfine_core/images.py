"""Images, from whatever holds them to what the detector takes: RGB, stretched to its input size.

EXIF orientation is not applied, as in training and evaluation: boxes are in the pixels as they are stored. Pillow comes
with torchvision, and is imported with the first image.
"""

import base64
import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    import PIL.Image

PIXEL_LIMIT = 89_478_485  # of one image, read from its header before any pixel is decoded; 256 MiB as RGB
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # of Pillow, some of whose others start programs

# A path, an encoded image or its base64 text, an array [H, W, 3] of uint8 RGB, or an opened image.
ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | NDArray[Any] | list[Any] | PIL.Image.Image"


def read_image(value: "ImageSource") -> "PIL.Image.Image":
    """One image in RGB: 16-bit levels lose their lower byte, an alpha channel is dropped.

    Args:
        value: a list is an array as JSON has it, [H][W][3].

    Raises:
        ValueError: it is none, is broken or has too many pixels; says what was given.
    """
    import PIL.Image

    if isinstance(value, PIL.Image.Image):
        return _as_rgb(value)
    if isinstance(value, np.ndarray | list):
        return _from_array(np.asarray(value))
    if isinstance(value, str) and not os.path.isfile(value):
        try:
            value = base64.b64decode(value, validate=True)
        except ValueError:  # binascii.Error is one
            raise ValueError(f"image {value[:80]!r} is neither a file here nor base64 text") from None
    if not isinstance(value, str | os.PathLike | bytes):
        raise ValueError(f"an image is a path, bytes, an array or a Pillow image, not {type(value).__name__}")
    try:
        image = PIL.Image.open(io.BytesIO(value) if isinstance(value, bytes) else value, formats=FORMATS)
    except PIL.UnidentifiedImageError:
        raise ValueError(f"an image cannot be opened: it is none of {', '.join(FORMATS)}") from None
    except Exception as error:  # each of Pillow's formats raises errors of its own
        raise ValueError(f"an image cannot be opened: {error}") from error
    with image:
        return _as_rgb(image)


def listed(images: "Sequence[ImageSource] | ImageSource") -> list[ImageSource]:
    """A single image as a list of one; of several a list."""
    import PIL.Image

    single = isinstance(images, str | bytes | os.PathLike | PIL.Image.Image)
    if single or (isinstance(images, np.ndarray) and images.ndim < 4):
        return [images]  # type: ignore[list-item]
    return list(images)  # type: ignore[arg-type]


def prepare(images: Sequence["PIL.Image.Image"], input_size: tuple[int, int]) -> Tensor:
    """[B, 3, H, W] uint8: whole RGB images through Pillow's antialiased bilinear filter, as in the released evaluation.

    Args:
        input_size: (height, width).
    """
    import PIL.Image

    height, width = input_size
    stretched = [np.asarray(image.resize((width, height), PIL.Image.Resampling.BILINEAR)) for image in images]
    pixels = np.stack(stretched) if stretched else np.zeros((0, height, width, 3), np.uint8)
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def sizes_of(images: Sequence["PIL.Image.Image"]) -> Tensor:
    """[B, 2] (width, height) in pixels, int64."""
    return torch.tensor([image.size for image in images], dtype=torch.int64).reshape(-1, 2)


def _as_rgb(image: "PIL.Image.Image") -> "PIL.Image.Image":
    import PIL.Image

    if image.width * image.height > PIXEL_LIMIT:
        raise ValueError(f"an image of {image.width}x{image.height} pixels exceeds the limit of {PIXEL_LIMIT}")
    if image.mode in ("I", "F"):
        raise ValueError(f"an image of mode {image.mode}, levels of unknown range; convert it to 8 or 16 bits")
    try:
        if image.mode.startswith("I;16"):
            return PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    except Exception as error:
        raise ValueError(f"a broken {image.format} image: {error}") from error


def _from_array(pixels: NDArray[Any]) -> "PIL.Image.Image":
    import PIL.Image

    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0 or pixels.dtype.kind not in "iu":
        raise ValueError(f"an image array must be [H, W, 3] of uint8, got {list(pixels.shape)} of {pixels.dtype}")
    if pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(f"an image array must hold 0..255, got {pixels.min()}..{pixels.max()}")
    return PIL.Image.fromarray(pixels.astype(np.uint8))

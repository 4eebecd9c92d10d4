"""Triton kernel of the photometric distortion: one pass over the images, where `photometric.py` makes about thirty.

The interpreter of Triton (TRITON_INTERPRET=1) runs the same kernel on a CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.data.augment.photometric_parameters import Photometric

PIXELS = 1024  # of one program


@triton.jit
def _blend(x, base, factor):
    """Scale the distance from the base; in this form, exactly x for a factor of 1."""
    return _clip(x + (1 - factor) * (base - x))


@triton.jit
def _clip(x):
    return tl.where(x < 0, 0.0, tl.where(x > 1, 1.0, x))


@triton.jit
def _of_hue(hue, value, chroma, turn: tl.constexpr):
    """Channel of a colour from its hue in sixths of a turn, value and chroma."""
    lacking = hue + turn
    lacking = lacking - 6 * tl.floor(lacking / 6)
    return value - chroma * _clip(2 - tl.abs(lacking - 2))


@triton.jit(do_not_specialize=("height", "width"))
def _distort_kernel(
    images, parameters, out, height, width,
    COLUMNS: tl.constexpr, BRIGHTNESS: tl.constexpr, CONTRAST: tl.constexpr, SATURATION: tl.constexpr, HUE: tl.constexpr,
    CONTRAST_FIRST: tl.constexpr, RED_FROM: tl.constexpr, MEAN_GREY: tl.constexpr, LEFT: tl.constexpr,
    TINY: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Distort PIXELS of one image."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    image = tl.program_id(1)
    row = parameters + image * COLUMNS
    size = height * width
    live = pixel < size
    source = images + image.to(tl.int64) * 3 * size
    red = tl.load(source + pixel, mask=live, other=0.0)
    green = tl.load(source + size + pixel, mask=live, other=0.0)
    blue = tl.load(source + 2 * size + pixel, mask=live, other=0.0)

    # Brightness, and contrast if it comes first
    brightness, contrast, saturation = tl.load(row + BRIGHTNESS), tl.load(row + CONTRAST), tl.load(row + SATURATION)
    first = tl.load(row + CONTRAST_FIRST) > 0
    mean_grey = _clip(tl.load(row + MEAN_GREY) * brightness)
    early, late = tl.where(first, contrast, 1.0), tl.where(first, 1.0, contrast)
    red = _blend(_clip(red * brightness), mean_grey, early)
    green = _blend(_clip(green * brightness), mean_grey, early)
    blue = _blend(_clip(blue * brightness), mean_grey, early)

    # Saturation
    grey = 0.2989 * red + 0.587 * green + 0.114 * blue
    red, green, blue = _blend(red, grey, saturation), _blend(green, grey, saturation), _blend(blue, grey, saturation)

    # Hue
    value = tl.maximum(red, tl.maximum(green, blue))
    chroma = value - tl.minimum(red, tl.minimum(green, blue))
    from_green, from_blue = blue - red + 2 * chroma, red - green + 4 * chroma
    hue = tl.where(value == red, green - blue, tl.where(value == green, from_green, from_blue))
    hue = hue / tl.maximum(chroma, TINY) + 6 * tl.load(row + HUE)
    red, green, blue = _of_hue(hue, value, chroma, 5), _of_hue(hue, value, chroma, 3), _of_hue(hue, value, chroma, 1)

    # Contrast if it comes last
    red, green, blue = _blend(red, mean_grey, late), _blend(green, mean_grey, late), _blend(blue, mean_grey, late)

    # Channels exchanged, and zero outside the rectangle
    x, y = (pixel % width).to(tl.float32), (pixel // width).to(tl.float32)
    inside = (x >= tl.load(row + LEFT)) & (x < tl.load(row + LEFT + 2))
    inside = inside & (y >= tl.load(row + LEFT + 1)) & (y < tl.load(row + LEFT + 3))
    target = out + image.to(tl.int64) * 3 * size + pixel
    for channel in tl.static_range(3):
        origin = tl.load(row + RED_FROM + channel)
        colour = tl.where(origin == 0, red, tl.where(origin == 1, green, blue))
        tl.store(target + channel * size, tl.where(inside, colour, 0.0), mask=live)


def distort(images: Tensor, parameters: Tensor) -> Tensor:
    """Compute `photometric.fused_distortion`."""
    images, parameters = images.contiguous(), parameters.contiguous()
    batch, _, height, width = images.shape
    out = torch.empty_like(images)
    if out.numel():
        names = ("BRIGHTNESS", "CONTRAST", "SATURATION", "HUE", "CONTRAST_FIRST", "RED_FROM", "MEAN_GREY", "LEFT")
        columns = {name: int(Photometric[name]) for name in names}
        grid = (triton.cdiv(height * width, PIXELS), batch)
        tiny = torch.finfo(torch.float32).tiny
        _distort_kernel[grid](
            images, parameters, out, height, width, COLUMNS=parameters.shape[1], TINY=tiny, PIXELS=PIXELS, **columns
        )
    return out

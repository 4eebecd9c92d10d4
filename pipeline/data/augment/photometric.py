"""Photometric distortion and multi-scale resize: the augmentations that run on the device, for a whole batch at once.

Nothing is random here: the parameters were drawn with each sample (`photometric_parameters.py`), so a sample does not
depend on the batch that it is in. A training on the CPU distorts where images are decoded (`photometric_pixels.py`), and one on
a GPU with Triton in a single pass (`photometric_triton.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dfine_core import fused_kernels
from pipeline.data.augment.photometric_parameters import Photometric


def photometric_distort(images: Tensor, parameters: Tensor) -> Tensor:
    """Change brightness, contrast, saturation, hue and channel order, in torchvision's order and arithmetic.

    Contrast is relative to the mean grey of the whole image, as in the released recipe, where distortion precedes the crop.
    That mean is updated for the brightness change alone: saturation preserves a grey level, and a hue shift of at most 0.05
    changes it little.

    Args:
        images: [B, 3, H, W] in 0..1, on their canvas.
        parameters: [B, P], columns of `Photometric`; the rectangle is in pixels of this canvas, so resize afterwards.

    Returns:
        [B, 3, H, W] in 0..1, zero outside the rectangle.
    """
    if fused_kernels.usable(images) and images.dtype == torch.float32:
        return fused_distortion(images, parameters.float())
    return _plain_distortion(images, parameters)


@torch.library.custom_op("dfine::photometric_distort", mutates_args=())
def fused_distortion(images: Tensor, parameters: Tensor) -> Tensor:
    """Compute `photometric_distort` in one launch; both in float32, without gradients."""
    from pipeline.data.augment import photometric_triton

    return photometric_triton.distort(images, parameters)


@fused_distortion.register_fake
def _(images: Tensor, _parameters: Tensor) -> Tensor:
    return torch.empty_like(images, memory_format=torch.contiguous_format)


def _plain_distortion(images: Tensor, parameters: Tensor) -> Tensor:
    def column(name: Photometric) -> Tensor:
        return parameters[:, name].to(images.dtype).view(-1, 1, 1, 1)

    contrast, contrast_first = column(Photometric.CONTRAST), column(Photometric.CONTRAST_FIRST) > 0
    mean_grey = (column(Photometric.MEAN_GREY) * column(Photometric.BRIGHTNESS)).clamp(0, 1)

    distorted = (images * column(Photometric.BRIGHTNESS)).clamp(0, 1)
    distorted = _blend(distorted, mean_grey, torch.where(contrast_first, contrast, 1))
    distorted = _blend(distorted, _grey(distorted), column(Photometric.SATURATION))
    distorted = _shift_hue(distorted, column(Photometric.HUE))
    distorted = _blend(distorted, mean_grey, torch.where(contrast_first, 1, contrast))
    channels = parameters[:, Photometric.RED_FROM : Photometric.BLUE_FROM + 1].long()  # [B, 3]
    distorted = distorted[torch.arange(len(images), device=images.device).unsqueeze(1), channels]
    return distorted.mul_(_inside(parameters, images.shape[-2], images.shape[-1]))


def leaves_unchanged(parameters: Tensor) -> bool:
    """Whether `photometric_distort` with these parameters [B, P], in host memory, would change no image."""
    changing = parameters[:, [c for c in Photometric if c < Photometric.MEAN_GREY and c != Photometric.CONTRAST_FIRST]]
    return bool((changing == changing.new_tensor([1, 1, 1, 0, 0, 1, 2])).all())


def resize_images(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a batch to [B, 3, *size], bilinear and antialiased. Normalised boxes do not change."""
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)


def _blend(images: Tensor, base: Tensor, factor: Tensor) -> Tensor:
    """Return factor * images + (1 - factor) * base, and exactly `images` for a factor of 1."""
    return images.lerp(base, 1 - factor).clamp_(0, 1)


def _grey(images: Tensor) -> Tensor:
    """Luminance [B, 1, H, W]."""
    red, green, blue = images.chunk(3, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def _shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of [B, 3, H, W] images by `shift` [B, 1, 1, 1] turns; saturation and value (of HSV) stay.

    With the hue h in sixths of a turn, red is value - chroma * clamp(2 - |(h + 5) mod 6 - 2|, 0, 1); for green and blue
    it is h + 3 and h + 1.
    """
    red, green, blue = images.chunk(3, dim=1)
    value = images.amax(dim=1, keepdim=True)
    chroma = value - images.amin(dim=1, keepdim=True)
    from_green, from_blue = blue - red + 2 * chroma, red - green + 4 * chroma
    hue = torch.where(value == red, green - blue, torch.where(value == green, from_green, from_blue))
    hue = hue / chroma.clamp(min=torch.finfo(images.dtype).tiny) + 6 * shift  # grey has no hue: any value will do
    lacking = hue + images.new_tensor([5, 3, 1]).view(1, 3, 1, 1)  # [B, 3, H, W]
    lacking.remainder_(6).sub_(2).abs_().neg_().add_(2).clamp_(0, 1)  # in place: most of the time goes here
    return torch.addcmul(value, chroma, lacking, value=-1)


def _inside(parameters: Tensor, height: int, width: int) -> Tensor:
    """Mask [B, 1, H, W] of the pixels that hold image."""
    x = torch.arange(width, device=parameters.device)
    y = torch.arange(height, device=parameters.device)
    left, top, right, bottom = (
        parameters[:, Photometric.LEFT : Photometric.BOTTOM + 1].unsqueeze(-1).unbind(1)
    )  # [B, 1]
    inside = ((y >= top) & (y < bottom)).unsqueeze(2) & ((x >= left) & (x < right)).unsqueeze(1)
    return inside.unsqueeze(1)

"""Mixup and copy-paste on the device, for a whole micro-batch whose colours are final; drawn in `blend.py`."""

from torch import Tensor

from pipeline.data.augment.blend import Blend


def blend_images(images: Tensor, blend: Blend) -> Tensor:
    """Blend the images of a micro-batch [B, 3, H, W], on their canvas: resize afterwards.

    Mixup mixes each image with the one before it, and the first with the last. Copy-paste takes pixels from the images as they
    were, and puts them over earlier pastes.
    """
    if blend.ratio == 1:
        return images
    if not blend.pastes:
        return images.lerp(images.roll(1, dims=0), 1 - blend.ratio)
    blended = images.clone()
    for paste in blend.pastes:
        below = _part(blended, paste.image, paste.to_left, paste.to_top, paste.width, paste.height)
        below.lerp_(_part(images, paste.source, paste.left, paste.top, paste.width, paste.height), 1 - blend.ratio)
    return blended


def _part(images: Tensor, image: int, left: int, top: int, width: int, height: int) -> Tensor:
    return images[image, :, top : top + height, left : left + width]

"""Training samples: the released augmentation, drawn from the boxes alone and then executed on the pixels once.

Zoom-out, IoU crop, flip and resize are drawn first and come to one `View`: which part of the image is seen, and where
on the canvas. Photometric distortion is drawn here, travels as a row of numbers beside the uint8 image, and is applied
to the whole batch on its device (`photometric.py`). Each draw has the distribution of torchvision's transform in the
released order (D-FINE's training recipe), down to how sizes are truncated to whole pixels.

A draw is keyed by (seed, epoch, image id): the sample is the same in whatever order, process or thread it is made.
"""

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import ClassVar, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.augment.decode import Rectangle, View, crop_and_place, decode_rgb, stretch

Interval = tuple[float, float]


class Photometric(IntEnum):
    """Columns of `Sample.photometric` [P]."""

    BRIGHTNESS = 0  # factors, 1 leaves the image as it is
    CONTRAST = 1
    SATURATION = 2
    HUE = 3  # shift in turns, 0 leaves the image as it is
    CONTRAST_FIRST = 4  # 1: contrast before saturation and hue, 0: after
    RED_FROM = 5  # the channel, 0 to 2, that becomes red
    GREEN_FROM = 6
    BLUE_FROM = 7
    MEAN_GREY = 8  # of the whole image before any distortion, in 0..1: contrast changes the distance from it
    LEFT = 9  # the part of the canvas that holds image, in pixels; the rest is zero and stays zero
    TOP = 10
    RIGHT = 11
    BOTTOM = 12


@dataclass(frozen=True)
class AugmentSettings:
    """What is drawn, how often, and from which range; the defaults are the released recipe.

    Intervals are those of uniform distributions.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {
        "extra": "forbid"
    }  # an experiment's file with another key is refused

    photometric_probability: float = 0.5  # of each of brightness, contrast, saturation, hue and channel order
    brightness: Interval = (0.875, 1.125)
    contrast: Interval = (0.5, 1.5)
    saturation: Interval = (0.5, 1.5)
    hue: Interval = (-0.05, 0.05)
    zoom_out_probability: float = 0.5
    zoom_out_factor: Interval = (1.0, 4.0)
    iou_crop_probability: float = 0.8
    iou_crop_options: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # least IoU; 1 takes the image as it is
    iou_crop_scale: Interval = (0.3, 1.0)  # of each side
    iou_crop_aspect: Interval = (0.5, 2.0)
    iou_crop_trials: int = 40  # for each option drawn
    flip_probability: float = 0.5
    min_box_size: float = 1.0  # px, both before and after resizing

    # Beyond the released recipe. Large-scale jitter replaces zoom-out and IoU crop; the others are in mixing.py.
    large_scale_jitter_probability: float = 0.0
    large_scale_jitter_scale: Interval = (0.1, 2.0)
    mosaic_probability: float = 0.0
    mosaic_centre: Interval = (0.3, 0.7)  # of each side of the canvas
    mixup_probability: float = 0.0
    mixup_weight: Interval = (0.45, 0.55)  # of the other image
    copy_paste_probability: float = 0.0
    copy_paste_object_probability: float = 0.5  # of each object of the other image
    copy_paste_max_covered: float = 0.7  # an object of which a larger part is pasted over is dropped

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.endswith("_probability") and not 0 <= value <= 1:
                raise ValueError(f"{name} ({value}) must lie in 0..1")
        if max(self.iou_crop_options, default=0) < 1:
            raise ValueError(
                f"iou_crop_options {self.iou_crop_options} need a 1, which takes the image as it is: no crop "
                "may fulfil the others"
            )

    def clean(self) -> "AugmentSettings":
        """For the last epochs: flip and resize alone."""
        return replace(
            self,
            photometric_probability=0,
            zoom_out_probability=0,
            iou_crop_probability=0,
            large_scale_jitter_probability=0,
            mosaic_probability=0,
            mixup_probability=0,
            copy_paste_probability=0,
        )


@dataclass(frozen=True)
class Sample:
    """One picture on its canvas, with G boxes."""

    image: NDArray[np.uint8]  # [H, W, 3] RGB
    boxes: NDArray[np.float32]  # [G, 4] cxcywh, normalised to the canvas
    labels: NDArray[np.int64]  # [G]
    photometric: NDArray[np.float32]  # [P], columns of `Photometric`


def augmented_sample(
    encoded: bytes,
    width: int,
    height: int,
    boxes: NDArray[np.float32],
    labels: NDArray[np.integer],
    *,
    seed: int,
    epoch: int,
    image_id: int,
    settings: AugmentSettings,
    canvas: tuple[int, int],
) -> Sample:
    """An image for training.

    Args:
        encoded: the image file, of width x height stored pixels.
        boxes: [G, 4] xyxy in pixels; clipped to the image, and dropped where nothing remains.
        labels: [G]
        canvas: height and width of the sample.

    Raises:
        UndecodableImageError: with the reason.
    """
    generator = keyed_generator("image", seed, epoch, image_id)
    boxes, labels = _within_image(boxes, labels, width, height)
    photometric = draw_photometric(generator, settings)
    view, kept = draw_view(generator, boxes, width, height, settings, canvas)
    pixels = decode_rgb(encoded, width, height, view.divisor)
    photometric[Photometric.MEAN_GREY] = mean_grey(pixels)
    photometric[Photometric.LEFT :] = view.region
    return Sample(
        image=crop_and_place(pixels, view, canvas, view.divisor),
        boxes=_normalised(boxes_on_canvas(view, boxes[kept]), canvas),
        labels=labels[kept].astype(np.int64),
        photometric=photometric,
    )


def plain_sample(
    encoded: bytes,
    width: int,
    height: int,
    boxes: NDArray[np.float32],
    labels: NDArray[np.integer],
    *,
    canvas: tuple[int, int],
) -> Sample:
    """An image for evaluation, stretched to the canvas; arguments and errors as in `augmented_sample`."""
    boxes, labels = _within_image(boxes, labels, width, height)
    whole = composed_view(Rectangle(0, 0, width, height), width, height, canvas, flip=False)
    pixels = decode_rgb(encoded, width, height)
    photometric = identity_photometric()
    photometric[Photometric.LEFT :] = whole.region
    return Sample(
        image=stretch(pixels, canvas),
        boxes=_normalised(boxes_on_canvas(whole, boxes), canvas),
        labels=labels.astype(np.int64),
        photometric=photometric,
    )


def multiscale_size(seed: int, global_step: int, base: int, repeat: int) -> int:
    """Side of the square that all workers resize this step to: `base` or a multiple of 32 within a quarter of it.

    Args:
        repeat: how often `base` itself counts among the sizes; 0 turns the choice off.
    """
    if repeat == 0:
        return base
    smallest, largest = int(0.75 * base / 32) * 32, int(1.25 * base / 32) * 32
    sizes = [*range(smallest, base, 32), *[base] * repeat, *range(largest, base, -32)]
    return sizes[int(keyed_generator("multiscale", seed, global_step).integers(len(sizes)))]


def keyed_generator(
    purpose: Literal["image", "mixing", "multiscale"], seed: int, key: int, subkey: int = 0
) -> np.random.Generator:
    """A generator of its own for each (purpose, seed, key, subkey), the same in every process."""
    low_64_bits = 2**64 - 1
    number = {"image": 0, "mixing": 1, "multiscale": 2}[purpose]
    # Philox counts in the first word alone, so sequences with other words in the rest never meet.
    counter = np.array([0, number, key & low_64_bits, subkey & low_64_bits], np.uint64)
    return np.random.Generator(np.random.Philox(key=seed & low_64_bits, counter=counter))


def identity_photometric() -> NDArray[np.float32]:
    """[P] that leave an image as it is."""
    row = np.zeros(len(Photometric), np.float32)
    row[[Photometric.BRIGHTNESS, Photometric.CONTRAST, Photometric.SATURATION]] = 1
    row[[Photometric.RED_FROM, Photometric.GREEN_FROM, Photometric.BLUE_FROM]] = 0, 1, 2
    return row


def draw_photometric(generator: np.random.Generator, settings: AugmentSettings) -> NDArray[np.float32]:
    """[P] with all that does not depend on the image."""
    row = identity_photometric()
    intervals = (settings.brightness, settings.contrast, settings.saturation, settings.hue)
    for column, (low, high) in enumerate(intervals):
        if generator.random() < settings.photometric_probability:
            row[column] = generator.uniform(low, high)
    row[Photometric.CONTRAST_FIRST] = generator.random() < 0.5
    if generator.random() < settings.photometric_probability:
        row[Photometric.RED_FROM : Photometric.BLUE_FROM + 1] = generator.permutation(3)
    return row


def draw_view(
    generator: np.random.Generator,
    boxes: NDArray[np.float32],
    width: int,
    height: int,
    settings: AugmentSettings,
    canvas: tuple[int, int],
) -> tuple[View, NDArray[np.bool_]]:
    """Zoom-out, IoU crop and flip of one image.

    Args:
        boxes: [G, 4] xyxy in pixels of the image, within it.

    Returns:
        the view, and which boxes [G] are seen in it.
    """
    crop = Rectangle(0, 0, width, height)
    kept = np.ones(len(boxes), np.bool_)
    if generator.random() < settings.large_scale_jitter_probability:
        crop = draw_large_scale_jitter(generator, width, height, settings.large_scale_jitter_scale)
        kept = _centres_within(boxes, np.array([crop]))[0]
    else:
        if generator.random() < settings.zoom_out_probability:
            crop = draw_zoom_out(generator, width, height, settings.zoom_out_factor)
        if len(boxes) and generator.random() < settings.iou_crop_probability:
            crop, kept = draw_iou_crop(generator, boxes, crop, settings)
    flip = bool(generator.random() < settings.flip_probability)

    view = composed_view(crop, width, height, canvas, flip)
    seen = _clipped(boxes, view.source)
    sizes = (seen[:, 2:] - seen[:, :2]) * np.minimum(view.scale, 1)
    return view, kept & (sizes >= settings.min_box_size).all(axis=1)


def draw_zoom_out(generator: np.random.Generator, width: int, height: int, factor: Interval) -> Rectangle:
    """A rectangle around the image, of its sides times one factor, at a random place; in pixels of the image."""
    drawn = generator.uniform(*factor)
    outer_width, outer_height = int(width * drawn), int(height * drawn)
    left, top = (-int(slack * generator.random()) for slack in (outer_width - width, outer_height - height))
    return Rectangle(left, top, left + outer_width, top + outer_height)


def draw_iou_crop(
    generator: np.random.Generator, boxes: NDArray[np.float32], outer: Rectangle, settings: AugmentSettings
) -> tuple[Rectangle, NDArray[np.bool_]]:
    """A crop of `outer` that overlaps one of the boxes by a drawn least IoU.

    An option is drawn until one is met within its trials, or asks for no crop. The trials of an option are independent,
    so the first success among all of them, drawn at once, is the one that trying them in turn would find.

    Args:
        boxes: [G, 4] xyxy, G > 0, in the coordinates of `outer`.

    Returns:
        the crop, and which boxes [G] have their centre in it.
    """
    narrowest, widest = settings.iou_crop_aspect
    smallest, largest = settings.iou_crop_scale
    while True:
        least_iou = settings.iou_crop_options[int(generator.integers(len(settings.iou_crop_options)))]
        if least_iou >= 1:
            return outer, np.ones(len(boxes), np.bool_)
        drawn = generator.random((4, settings.iou_crop_trials))
        width = (outer.width * (smallest + (largest - smallest) * drawn[0])).astype(np.int64)
        height = (outer.height * (smallest + (largest - smallest) * drawn[1])).astype(np.int64)
        left = outer.left + ((outer.width - width) * drawn[2]).astype(np.int64)
        top = outer.top + ((outer.height - height) * drawn[3]).astype(np.int64)
        usable = (width >= narrowest * height) & (width <= widest * height) & (width > 0) & (height > 0)
        crops = np.stack([left, top, left + width, top + height], axis=1)[usable]  # [T, 4]

        centred = _centres_within(boxes, crops)  # [T, G]
        best_iou = np.where(centred, _pairwise_iou(crops, boxes), -1).max(axis=1)
        fulfilled = np.flatnonzero(best_iou >= least_iou)
        if len(fulfilled):
            first = fulfilled[0]
            return Rectangle(*crops[first].tolist()), centred[first]


def draw_large_scale_jitter(generator: np.random.Generator, width: int, height: int, scale: Interval) -> Rectangle:
    """The rectangle that, stretched to the canvas, shows the image `scale` times as large, at a random place.

    Source: Simple Copy-Paste, arXiv:2012.07177.
    """
    drawn = generator.uniform(*scale)
    seen_width, seen_height = max(1, round(width / drawn)), max(1, round(height / drawn))
    left, top = (round(slack * generator.random()) for slack in (width - seen_width, height - seen_height))
    return Rectangle(left, top, left + seen_width, top + seen_height)


def composed_view(crop: Rectangle, width: int, height: int, canvas: tuple[int, int], flip: bool) -> View:
    """The view in which `crop`, which may reach over the edge of the image, is stretched over the whole canvas.

    The image's part of the canvas is rounded to whole pixels; boxes follow it, so they stay on their objects.
    """
    canvas_height, canvas_width = canvas
    source = Rectangle(max(crop.left, 0), max(crop.top, 0), min(crop.right, width), min(crop.bottom, height))
    left, right = _whole_pixels(source.left - crop.left, source.right - crop.left, crop.width, canvas_width)
    top, bottom = _whole_pixels(source.top - crop.top, source.bottom - crop.top, crop.height, canvas_height)
    if flip:
        left, right = canvas_width - right, canvas_width - left
    return View(source, Rectangle(left, top, right, bottom), flip)


def boxes_on_canvas(view: View, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """[G, 4] xyxy in pixels of the canvas, clipped to what is seen, of boxes xyxy in pixels of the image."""
    region = view.region
    seen = (_clipped(boxes, view.source) - view.source[:2] * 2) * (view.scale * 2)
    if view.flip:
        seen[:, [0, 2]] = region.width - seen[:, [2, 0]]
    return (seen + region[:2] * 2).astype(np.float32)


def mean_grey(pixels: NDArray[np.uint8]) -> float:
    """Mean luminance in 0..1 of [H, W, 3] pixels."""
    red, green, blue, _ = cv2.mean(pixels)
    return (0.2989 * red + 0.587 * green + 0.114 * blue) / 255


def _whole_pixels(start: int, stop: int, side: int, canvas_side: int) -> tuple[int, int]:
    """start..stop of 0..side, on 0..canvas_side: at least one pixel."""
    first = min(round(start * canvas_side / side), canvas_side - 1)
    return first, max(round(stop * canvas_side / side), first + 1)


def _within_image(
    boxes: NDArray[np.float32], labels: NDArray[np.integer], width: int, height: int
) -> tuple[NDArray[np.float32], NDArray[np.integer]]:
    clipped = _clipped(boxes, Rectangle(0, 0, width, height))
    left, top, right, bottom = clipped.T
    kept = (right > left) & (bottom > top)
    return clipped[kept], labels[kept]


def _clipped(boxes: NDArray[np.float32], bounds: Rectangle) -> NDArray[np.float32]:
    clipped = np.minimum(np.maximum(boxes, bounds[:2] * 2), bounds[2:] * 2)
    return clipped.astype(np.float32, copy=False)


def _centres_within(boxes: NDArray[np.float32], crops: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[T, G] whether the centre of each of G boxes lies strictly inside each of T crops."""
    left, top, right, bottom = crops.T[:, :, np.newaxis]  # [T, 1] each
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2  # [G]
    inside: NDArray[np.bool_] = (left < x) & (x < right) & (top < y) & (y < bottom)
    return inside


def _pairwise_iou(crops: NDArray[np.int64], boxes: NDArray[np.float32]) -> NDArray[np.floating]:
    """[T, G]"""
    crop_left, crop_top, crop_right, crop_bottom = crops.T[:, :, np.newaxis]
    left, top, right, bottom = boxes.T
    width = np.maximum(np.minimum(crop_right, right) - np.maximum(crop_left, left), 0)
    height = np.maximum(np.minimum(crop_bottom, bottom) - np.maximum(crop_top, top), 0)
    crop_area = (crop_right - crop_left) * (crop_bottom - crop_top)
    intersection = width * height
    iou: NDArray[np.floating] = intersection / (crop_area + (right - left) * (bottom - top) - intersection)
    return iou


def _normalised(boxes: NDArray[np.float32], canvas: tuple[int, int]) -> NDArray[np.float32]:
    """xyxy in pixels of the canvas to cxcywh in 0..1."""
    height, width = canvas
    centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    return (np.concatenate([centre, size], axis=1) / np.array([width, height] * 2)).astype(np.float32)

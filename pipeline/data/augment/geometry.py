"""Geometry of the augmentation: random views of an image, and boxes as they appear in a view.

Nothing here decodes a pixel: a view is drawn from the boxes and the size of the image alone, and is executed by `decode.py`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.augment.settings import AugmentSettings, Interval


class Rectangle(NamedTuple):
    """Whole pixels; right and bottom are exclusive."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        """Columns."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """Rows."""
        return self.bottom - self.top


class Orientation(NamedTuple):
    """How an image lies on the canvas: transposed first, then flipped. All eight are exact maps of pixels and boxes."""

    flip: bool = False  # left to right
    vertical_flip: bool = False  # top to bottom
    transpose: bool = False  # rows become columns


class View(NamedTuple):
    """The whole geometry of one sample: the part of an image that is seen, and its place on the canvas."""

    source: Rectangle  # in pixels of the image, within it
    region: Rectangle  # part of the canvas filled with `source`, stretched and perhaps flipped; the rest is zero
    flip: bool  # left to right
    vertical_flip: bool = False
    transpose: bool = False  # before the flips

    @property
    def stretched(self) -> tuple[int, int]:
        """Width and height of `source` on the canvas, along its own x and y."""
        sides = self.region.width, self.region.height
        return sides[::-1] if self.transpose else sides

    @property
    def scale(self) -> tuple[float, float]:
        """Canvas pixels per image pixel, along x and y of the image."""
        width, height = self.stretched
        return width / self.source.width, height / self.source.height

    @property
    def divisor(self) -> int:
        """1, 2, 4 or 8: factor by which the image may be decoded smaller."""
        return decode_divisor(max(self.scale))


def decode_divisor(scale: float) -> int:
    """1, 2, 4 or 8: factor by which an image that is drawn `scale` times as large may be decoded smaller.

    At least two decoded pixels remain per pixel drawn, so that the resampling filter still shapes the result.
    """
    return next(divisor for divisor in (8, 4, 2, 1) if divisor == 1 or 1 / scale >= 2 * divisor)


def draw_view(
    generator: np.random.Generator,
    boxes: NDArray[np.float32],
    width: int,
    height: int,
    settings: AugmentSettings,
    canvas: tuple[int, int],
    labelled: NDArray[np.bool_] | None = None,
) -> tuple[View, NDArray[np.bool_]]:
    """Draw zoom-out, IoU crop, flips and quarter turn of one image.

    Args:
        boxes: [G, 4] xyxy in pixels of the image, within it.
        labelled: mask [G] of the boxes that the draws depend on; the others follow them. None: all.
        canvas: height and width.

    Returns:
        The view, and a mask [G] of the boxes that are visible in it.
    """
    # The part of the image that fills the canvas, in the order and with the probabilities of the released recipe.
    crop = Rectangle(0, 0, width, height)
    kept = np.ones(len(boxes), np.bool_)
    if generator.random() < settings.large_scale_jitter_probability:
        crop = draw_large_scale_jitter(generator, width, height, settings.large_scale_jitter_scale)
        kept = _centres_within(boxes, np.array([crop]))[0]
    else:
        if generator.random() < settings.zoom_out_probability:
            crop = draw_zoom_out(generator, width, height, settings.zoom_out_factor)
        drawn_from = boxes if labelled is None else boxes[labelled]
        if len(drawn_from) and generator.random() < settings.iou_crop_probability:
            inner, _ = draw_iou_crop(generator, drawn_from, crop, settings)
            if inner is not crop:  # the option without a crop returns its argument
                crop, kept = inner, _centres_within(boxes, np.array([inner]))[0]
    orientation = draw_orientation(generator, settings)

    # Boxes that are too small before or after resizing are dropped.
    view = composed_view(crop, width, height, canvas, *orientation)
    seen = clip_boxes(boxes, view.source)
    sizes = (seen[:, 2:] - seen[:, :2]) * np.minimum(view.scale, 1)
    return view, kept & (sizes >= settings.min_box_size).all(axis=1)


def draw_orientation(generator: np.random.Generator, settings: AugmentSettings) -> Orientation:
    """Draw the flips, then the quarter turn after them; what is off draws nothing."""
    flip = bool(generator.random() < settings.flip_probability)
    vertical = settings.vertical_flip_probability > 0 and bool(generator.random() < settings.vertical_flip_probability)
    if settings.quarter_turn_probability > 0 and generator.random() < settings.quarter_turn_probability:
        return turned(Orientation(flip, vertical), int(generator.integers(1, 4)))
    return Orientation(flip, vertical)


def turned(orientation: Orientation, quarters: int) -> Orientation:
    """Turn an image that lies in this orientation clockwise by so many quarters."""
    for _ in range(quarters % 4):
        # A clockwise quarter is a transposition, which exchanges the flips before it, and a flip after it.
        flip, vertical, transpose = orientation
        orientation = Orientation(not vertical, flip, not transpose)
    return orientation


def draw_zoom_out(generator: np.random.Generator, width: int, height: int, factor: Interval) -> Rectangle:
    """A rectangle around the image, larger by one random factor and randomly placed; in pixels of the image."""
    zoom = generator.uniform(*factor)
    outer_width, outer_height = int(width * zoom), int(height * zoom)
    left, top = (-int(slack * generator.random()) for slack in (outer_width - width, outer_height - height))
    return Rectangle(left, top, left + outer_width, top + outer_height)


def draw_iou_crop(
    generator: np.random.Generator, boxes: NDArray[np.float32], outer: Rectangle, settings: AugmentSettings
) -> tuple[Rectangle, NDArray[np.bool_]]:
    """A random crop of `outer` that overlaps one of the boxes by at least a random minimum IoU.

    Options are drawn until one succeeds within its trials, or means no crop. The trials of an option are independent, so
    they are drawn together: the first success among them is the one that a sequential search would find.

    Args:
        boxes: [G, 4] xyxy, G > 0, in the coordinates of `outer`.

    Returns:
        The crop, and a mask [G] of the boxes whose centre lies in it.
    """
    narrowest, widest = settings.iou_crop_aspect
    smallest, largest = settings.iou_crop_scale
    while True:
        min_iou = settings.iou_crop_options[int(generator.integers(len(settings.iou_crop_options)))]
        if min_iou >= 1:
            return outer, np.ones(len(boxes), np.bool_)
        # All trials of this option at once.
        uniform = generator.random((4, settings.iou_crop_trials))
        width = (outer.width * (smallest + (largest - smallest) * uniform[0])).astype(np.int64)
        height = (outer.height * (smallest + (largest - smallest) * uniform[1])).astype(np.int64)
        left = outer.left + ((outer.width - width) * uniform[2]).astype(np.int64)
        top = outer.top + ((outer.height - height) * uniform[3]).astype(np.int64)
        usable = (width >= narrowest * height) & (width <= widest * height) & (width > 0) & (height > 0)
        crops = np.stack([left, top, left + width, top + height], axis=1)[usable]  # [T, 4]

        # The first crop in which some box, centred in it, overlaps enough.
        centred = _centres_within(boxes, crops)  # [T, G]
        best_iou = np.where(centred, _pairwise_iou(crops, boxes), -1).max(axis=1)
        successes = np.flatnonzero(best_iou >= min_iou)
        if len(successes):
            first = successes[0]
            return Rectangle(*crops[first].tolist()), centred[first]


def draw_large_scale_jitter(generator: np.random.Generator, width: int, height: int, scale: Interval) -> Rectangle:
    """The rectangle that, stretched to the canvas, shows the image `scale` times as large, randomly placed.

    Source: Simple Copy-Paste, arXiv:2012.07177.
    """
    zoom = generator.uniform(*scale)
    seen_width, seen_height = max(1, round(width / zoom)), max(1, round(height / zoom))
    left, top = (round(slack * generator.random()) for slack in (width - seen_width, height - seen_height))
    return Rectangle(left, top, left + seen_width, top + seen_height)


def composed_view(
    crop: Rectangle,
    width: int,
    height: int,
    canvas: tuple[int, int],
    flip: bool,
    vertical_flip: bool = False,
    transpose: bool = False,
) -> View:
    """The view that stretches `crop`, which may extend beyond the image, over the whole canvas.

    The image's part of the canvas is rounded to whole pixels; boxes follow it, so they stay on their objects.
    """
    canvas_height, canvas_width = canvas
    along_x, along_y = canvas if transpose else canvas[::-1]
    source = Rectangle(max(crop.left, 0), max(crop.top, 0), min(crop.right, width), min(crop.bottom, height))
    left, right = _whole_pixels(source.left - crop.left, source.right - crop.left, crop.width, along_x)
    top, bottom = _whole_pixels(source.top - crop.top, source.bottom - crop.top, crop.height, along_y)
    if transpose:
        left, top, right, bottom = top, left, bottom, right
    if flip:
        left, right = canvas_width - right, canvas_width - left
    if vertical_flip:
        top, bottom = canvas_height - bottom, canvas_height - top
    return View(source, Rectangle(left, top, right, bottom), flip, vertical_flip, transpose)


def boxes_on_canvas(view: View, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Map boxes [G, 4] xyxy from image pixels to canvas pixels, clipped to the visible part."""
    region = view.region
    seen = (clip_boxes(boxes, view.source) - view.source[:2] * 2) * (view.scale * 2)
    if view.transpose:
        seen = seen[:, [1, 0, 3, 2]]
    if view.flip:
        seen[:, [0, 2]] = region.width - seen[:, [2, 0]]
    if view.vertical_flip:
        seen[:, [1, 3]] = region.height - seen[:, [3, 1]]
    return (seen + region[:2] * 2).astype(np.float32)


def _whole_pixels(start: int, stop: int, side: int, canvas_side: int) -> tuple[int, int]:
    """Scale start..stop from 0..side to whole pixels of 0..canvas_side: at least one pixel."""
    first = min(round(start * canvas_side / side), canvas_side - 1)
    return first, max(round(stop * canvas_side / side), first + 1)


def clip_boxes(boxes: NDArray[np.float32], bounds: Rectangle) -> NDArray[np.float32]:
    """Clip boxes [G, 4] xyxy to a rectangle."""
    clipped = np.minimum(np.maximum(boxes, bounds[:2] * 2), bounds[2:] * 2)
    return clipped.astype(np.float32, copy=False)


def _centres_within(boxes: NDArray[np.float32], crops: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mask [T, G]: the centre of box g lies strictly inside crop t."""
    left, top, right, bottom = crops.T[:, :, np.newaxis]  # [T, 1] each
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2  # [G]
    inside: NDArray[np.bool_] = (left < x) & (x < right) & (top < y) & (y < bottom)
    return inside


def _pairwise_iou(crops: NDArray[np.int64], boxes: NDArray[np.float32]) -> NDArray[np.floating]:
    """IoU [T, G] of every crop and box."""
    crop_left, crop_top, crop_right, crop_bottom = crops.T[:, :, np.newaxis]
    left, top, right, bottom = boxes.T
    width = np.maximum(np.minimum(crop_right, right) - np.maximum(crop_left, left), 0)
    height = np.maximum(np.minimum(crop_bottom, bottom) - np.maximum(crop_top, top), 0)
    crop_area = (crop_right - crop_left) * (crop_bottom - crop_top)
    intersection = width * height
    iou: NDArray[np.floating] = intersection / (crop_area + (right - left) * (bottom - top) - intersection)
    return iou


def to_normalised_cxcywh(boxes: NDArray[np.float32], canvas: tuple[int, int]) -> NDArray[np.float32]:
    """Convert boxes [G, 4] xyxy in canvas pixels to cxcywh in 0..1."""
    height, width = canvas
    centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    return (np.concatenate([centre, size], axis=1) / np.array([width, height] * 2)).astype(np.float32)

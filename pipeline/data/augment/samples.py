"""Training and evaluation samples: the released augmentation, drawn from the boxes alone, then applied to the pixels once.

Zoom-out, IoU crop, flip and resize are drawn first and combine to one `View`: the part of the image that is seen, and its
place on the canvas. The parameters of the photometric distortion are drawn here too. They travel as a row of numbers beside
the uint8 image and are applied to the whole batch on its device (`photometric.py`). Each draw has the distribution of
torchvision's transform in the released order (D-FINE's training recipe), down to how sizes are truncated to whole pixels.

A draw is keyed by (seed, epoch, image id): the sample is the same in whatever order, process or thread it is made. An image that
is shown again in an epoch has the draws of an epoch of its own (`epoch_of_showing`).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.augment.decode import crop_and_place, decode_rgb, stretch
from pipeline.data.augment.generators import keyed_generator
from pipeline.data.augment.geometry import (
    Rectangle,
    View,
    boxes_on_canvas,
    clip_boxes,
    composed_view,
    draw_view,
    to_normalised_cxcywh,
)
from pipeline.data.augment.photometric_parameters import (
    Photometric,
    draw_photometric,
    identity_photometric,
    mean_grey,
)
from pipeline.data.augment.settings import AugmentSettings
from pipeline.data.shards.records import ImageRecord

# Marks tell what a box is for. A teacher's box has its score, 0..1; a label minus its weight, so that a true box has TRUTH.
TRUTH = -1.0
IGNORED = -2.0  # a region that teaches neither object nor background


@dataclass(frozen=True)
class AnnotatedImage:
    """An encoded image and its G boxes: labels, regions to ignore and, after them, those of a teacher."""

    encoded: bytes
    width: int  # stored pixels
    height: int
    boxes: NDArray[np.float32]  # [G, 4] xyxy in pixels; clipped to the image, and dropped where nothing remains
    labels: NDArray[np.integer]  # [G]
    areas: NDArray[np.float32]  # [G] px^2 as annotated; 0 for a teacher's and for regions to ignore
    marks: NDArray[np.float32] | None = None  # [G]; None: all are true


def is_label(marks: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Mask of the boxes to learn as objects, whatever their weight."""
    labelled: NDArray[np.bool_] = (marks < 0) & (marks != IGNORED)
    return labelled


def without_crowd(record: ImageRecord) -> AnnotatedImage:
    """An image of a shard with the boxes that training uses: all but crowd regions that are not to be ignored."""
    ignored = np.zeros(len(record.crowd), np.bool_) if record.weights is None else record.crowd & (record.weights == 0)
    learned, teacher = ~record.crowd | ignored, record.teacher
    boxes, labels, areas = record.boxes[learned], record.labels[learned], record.areas[learned]
    if teacher is None and record.weights is None:
        return AnnotatedImage(record.image, record.width, record.height, boxes, labels, areas)
    marks = np.full(len(labels), TRUTH, np.float32)
    if record.weights is not None:
        marks = np.where(ignored, np.float32(IGNORED), -record.weights)[learned]
        areas = np.where(ignored[learned], np.float32(0), areas)
    if teacher is not None:
        marks = np.concatenate([marks, teacher.scores])
        areas = np.concatenate([areas, np.zeros(len(teacher.labels), np.float32)])
        boxes, labels = np.concatenate([boxes, teacher.boxes]), np.concatenate([labels, teacher.labels])
    return AnnotatedImage(record.image, record.width, record.height, boxes, labels, areas, marks)


@dataclass(frozen=True)
class Sample:
    """One image on its canvas, with G boxes: true ones, and perhaps others among them."""

    image: NDArray[np.uint8]  # [H, W, 3] RGB
    boxes: NDArray[np.float32]  # [G, 4] cxcywh, normalised to the canvas
    labels: NDArray[np.int64]  # [G]
    areas: NDArray[np.float32]  # [G] px^2 of the canvas: the annotated area times the scale, whatever was cut off
    photometric: NDArray[np.float32]  # [P], columns of `Photometric`
    own_marks: NDArray[np.float32] | None = None  # [G]; None: all are true

    @property
    def marks(self) -> NDArray[np.float32]:
        """Mark of each box, [G]."""
        return np.full(len(self.labels), TRUTH, np.float32) if self.own_marks is None else self.own_marks


def augmented_sample(
    image: AnnotatedImage, *, seed: int, epoch: int, image_id: int, settings: AugmentSettings, canvas: tuple[int, int]
) -> Sample:
    """Augment an image for training.

    Args:
        canvas: height and width of the sample.

    Raises:
        UndecodableImageError: with the reason.
    """
    # All draws, before any pixel is decoded.
    generator = keyed_generator("image", seed, epoch, image_id)
    boxes, labels, areas, marks = within_image(image)
    photometric = draw_photometric(generator, settings)
    labelled = None if marks is None else is_label(marks)
    view, kept = draw_view(generator, boxes, image.width, image.height, settings, canvas, labelled)

    # Pixels are decoded as small as the view allows.
    pixels = decode_rgb(image.encoded, image.width, image.height, view.divisor)
    if photometric[Photometric.CONTRAST] != 1:
        photometric[Photometric.MEAN_GREY] = mean_grey(pixels)
    photometric[Photometric.LEFT :] = view.region
    return Sample(
        image=crop_and_place(pixels, view, canvas, view.divisor),
        boxes=to_normalised_cxcywh(boxes_on_canvas(view, boxes[kept]), canvas),
        labels=labels[kept].astype(np.int64),
        areas=_scaled(areas[kept], view),
        photometric=photometric,
        own_marks=None if marks is None else marks[kept],
    )


def plain_sample(image: AnnotatedImage, *, canvas: tuple[int, int]) -> Sample:
    """Stretch an image to the canvas, for evaluation; errors as in `augmented_sample`."""
    boxes, labels, areas, _ = within_image(image)
    whole = Rectangle(0, 0, image.width, image.height)
    view = composed_view(whole, image.width, image.height, canvas, flip=False)
    pixels = decode_rgb(image.encoded, image.width, image.height)
    photometric = identity_photometric()
    photometric[Photometric.LEFT :] = view.region
    return Sample(
        image=stretch(pixels, canvas),
        boxes=to_normalised_cxcywh(boxes_on_canvas(view, boxes), canvas),
        labels=labels.astype(np.int64),
        areas=_scaled(areas, view),
        photometric=photometric,
    )


def within_image(
    image: AnnotatedImage,
) -> tuple[NDArray[np.float32], NDArray[np.integer], NDArray[np.float32], NDArray[np.float32] | None]:
    """Boxes clipped to the image, their labels, areas and marks; those of which nothing is left are dropped."""
    clipped = clip_boxes(image.boxes, Rectangle(0, 0, image.width, image.height))
    left, top, right, bottom = clipped.T
    kept = (right > left) & (bottom > top)
    marks = image.marks
    return clipped[kept], image.labels[kept], image.areas[kept], None if marks is None else marks[kept]


def _scaled(areas: NDArray[np.float32], view: View) -> NDArray[np.float32]:
    scale_x, scale_y = view.scale
    return (areas * (scale_x * scale_y)).astype(np.float32)

"""Mixup and copy-paste: blends of the images of one micro-batch, drawn here and applied on the training device.

The released training blends finished batches, after all colours were distorted; `blend_pixels.py` does that on the device. A
draw is keyed by (seed, step, micro-batch): the plan fixes which images a micro-batch holds, so it is the same for any workers.
No torch here: data tasks import this module.

Sources: mixup of whole batches, DEIM, arXiv:2412.04234; copy-paste with a blend and a ring, DEIMv2, arXiv:2509.20787.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.augment.generators import keyed_generator
from pipeline.data.augment.samples import Sample, is_label
from pipeline.data.augment.settings import AugmentSettings


class Paste(NamedTuple):
    """One rectangle of pixels copied between two images of a micro-batch; all numbers in pixels of the canvas."""

    image: int  # index in the micro-batch, of the image that changes
    source: int
    left: int  # in the source
    top: int
    to_left: int
    to_top: int
    width: int
    height: int


class Blend(NamedTuple):
    """Blend of the images of one micro-batch: with pastes copy-paste, without any mixup."""

    ratio: float = 1.0  # weight of an image's own pixels; 1: unchanged
    pastes: tuple[Paste, ...] = ()


class PastedBox(NamedTuple):
    """Ground truth of a pasted object."""

    image: int  # index in the micro-batch
    box: NDArray[np.float32]  # [4] cxcywh, normalised to the canvas
    label: int
    mark: float  # copied with the object, see `samples`


def draw_blend(
    samples: Sequence[Sample], *, seed: int, step: int, micro_batch: int, settings: AugmentSettings
) -> tuple[Blend, list[PastedBox]]:
    """Draw mixup, or else copy-paste, or neither.

    Args:
        samples: one micro-batch, all on canvases of one size; a single one is not blended.
    """
    if len(samples) < 2 or not (settings.mixup_probability or settings.copy_paste_probability):
        return Blend(), []
    generator = keyed_generator("blend", seed, step, micro_batch)
    if generator.random() < settings.mixup_probability:
        return Blend(float(generator.uniform(*settings.mixup_ratio))), []
    if generator.random() < settings.copy_paste_probability:
        ratio = float(generator.uniform(*settings.copy_paste_ratio))
        pastes, boxes = _draw_pastes(generator, samples, settings)
        return (Blend(ratio, pastes), boxes) if pastes else (Blend(), [])
    return Blend(), []


def blended_targets(
    samples: Sequence[Sample], blend: Blend, pasted: Sequence[PastedBox]
) -> tuple[list[NDArray[np.float32]], list[NDArray[np.int64]], list[NDArray[np.float32]]]:
    """Boxes, labels and marks of each image after the blend, its own ones first; those of the other image count in full."""
    boxes, labels = [sample.boxes for sample in samples], [sample.labels for sample in samples]
    marks = [sample.marks for sample in samples]
    if blend.pastes:
        for image, box, label, mark in pasted:
            boxes[image] = np.concatenate([boxes[image], box[np.newaxis]])
            labels[image] = np.append(labels[image], label)
            marks[image] = np.append(marks[image], np.float32(mark))
    elif blend.ratio < 1:
        # An image is mixed with the one before it, the first with the last.
        return (
            [np.concatenate([boxes[i], boxes[i - 1]]) for i in range(len(samples))],
            [np.concatenate([labels[i], labels[i - 1]]) for i in range(len(samples))],
            [np.concatenate([marks[i], marks[i - 1]]) for i in range(len(samples))],
        )
    return boxes, labels, marks


def _draw_pastes(
    generator: np.random.Generator, samples: Sequence[Sample], settings: AugmentSettings
) -> tuple[tuple[Paste, ...], list[PastedBox]]:
    """Draw objects of the whole micro-batch for each of its images; objects that get covered keep their boxes."""
    pool = [
        (source, index)
        for source, sample in enumerate(samples)
        for index in np.flatnonzero(is_label(sample.marks) & (sample.areas >= settings.copy_paste_min_area)).tolist()
    ]
    height, width = samples[0].image.shape[:2]
    pastes, boxes = [], []
    for image in range(len(samples)):
        count = min(settings.copy_paste_objects, len(pool))
        for chosen in generator.permutation(len(pool))[:count].tolist():
            source, index = pool[chosen]
            left, top, right, bottom = _corners(samples[source].boxes[index], width, height)
            if right <= left or bottom <= top:
                continue
            to_left = int(generator.integers(max(width - (right - left), 0) + 1))
            to_top = int(generator.integers(max(height - (bottom - top), 0) + 1))
            ring = generator.uniform(*settings.copy_paste_ring)
            pastes.append(ringed(image, source, (left, top, right, bottom), (to_left, to_top), ring, width, height))
            box = to_left + (right - left) / 2, to_top + (bottom - top) / 2, right - left, bottom - top
            normalised = (np.array(box) / [width, height, width, height]).astype(np.float32)
            label, mark = int(samples[source].labels[index]), float(samples[source].marks[index])
            boxes.append(PastedBox(image, normalised, label, mark))
    return tuple(pastes), boxes


def ringed(
    image: int,
    source: int,
    corners: tuple[int, int, int, int],
    to: tuple[int, int],
    ring: float,
    width: int,
    height: int,
) -> Paste:
    """Paste of an object with a ring around it, cut alike where either canvas ends.

    Args:
        corners: left, top, right, bottom of the object in the source.
        to: left, top of the object in the image.
        ring: width of the ring as a share of the object's sides.
    """
    left, top, right, bottom = corners
    ring_x, ring_y = int(ring * (right - left)), int(ring * (bottom - top))
    to_right, to_bottom = to[0] + right - left, to[1] + bottom - top
    before_x, before_y = min(ring_x, left, to[0]), min(ring_y, top, to[1])
    after_x = min(ring_x, width - right, width - to_right)
    after_y = min(ring_y, height - bottom, height - to_bottom)
    return Paste(
        image,
        source,
        left - before_x,
        top - before_y,
        to[0] - before_x,
        to[1] - before_y,
        before_x + right - left + after_x,
        before_y + bottom - top + after_y,
    )


def _corners(box: NDArray[np.float32], width: int, height: int) -> tuple[int, int, int, int]:
    """Whole pixels of a normalised cxcywh box, toward zero, within the canvas."""
    x, y, box_width, box_height = box.astype(np.float64).tolist()
    left, right = (min(max(int((x + sign * box_width / 2) * width), 0), width) for sign in (-1, 1))
    top, bottom = (min(max(int((y + sign * box_height / 2) * height), 0), height) for sign in (-1, 1))
    return left, top, right, bottom

"""Augmentations of several images: mosaic, mixup and copy-paste. Beyond the released recipe, and off by default.

Partners come from the same micro-batch, whose members are fixed by the plan, and draws are keyed by the sample's own image
id: the result is the same in any process. Finished samples are mixed, so no image is decoded twice. The first sample's
photometric parameters apply to the whole mixture, and fill inside it counts as image.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.augment.decode import crop_and_place
from pipeline.data.augment.generators import keyed_generator
from pipeline.data.augment.geometry import Rectangle, View
from pipeline.data.augment.photometric_parameters import Photometric
from pipeline.data.augment.samples import Sample
from pipeline.data.augment.settings import AugmentSettings


def mixed_batch(
    samples: Sequence[Sample], image_ids: Sequence[int], *, seed: int, epoch: int, settings: AugmentSettings
) -> list[Sample]:
    """Mix each sample with others of its batch, with the probabilities of `settings`: mosaic, then copy-paste, then mixup.

    Args:
        samples: one micro-batch, all on canvases of one size; a single sample is returned unchanged.
        image_ids: image id of each sample.
    """
    if len(samples) < 2 or not settings.mixes:
        return list(samples)
    return [
        _mixed(index, samples, keyed_generator("mixing", seed, epoch, image_id), settings)
        for index, image_id in enumerate(image_ids)
    ]


def mosaic(tiles: Sequence[Sample], centre_x: int, centre_y: int, min_box_size: float) -> Sample:
    """Shrink four samples into the four parts of one canvas.

    Args:
        tiles: top left, top right, bottom left, bottom right.
        centre_x, centre_y: corner shared by the four parts, in pixels, inside the canvas.
        min_box_size: minimum side in pixels; smaller boxes are dropped.
    """
    height, width = tiles[0].image.shape[:2]
    whole = Rectangle(0, 0, width, height)
    parts = [
        Rectangle(left, top, right, bottom)
        for top, bottom in ((0, centre_y), (centre_y, height))
        for left, right in ((0, centre_x), (centre_x, width))
    ]
    image = np.empty_like(tiles[0].image)
    boxes, mean_grey = [], 0.0
    for tile, part in zip(tiles, parts, strict=True):
        view = View(source=whole, region=Rectangle(0, 0, part.width, part.height), flip=False)
        image[part.top : part.bottom, part.left : part.right] = crop_and_place(
            tile.image, view, (part.height, part.width)
        )
        scale = np.array([part.width / width, part.height / height] * 2)
        boxes.append(tile.boxes * scale + np.array([part.left / width, part.top / height, 0, 0]))
        mean_grey += tile.photometric[Photometric.MEAN_GREY] * scale[0] * scale[1]
    joined = np.concatenate(boxes).astype(np.float32)
    kept = (joined[:, 2:] * [width, height] >= min_box_size).all(axis=1)
    return Sample(
        image=image,
        boxes=joined[kept],
        labels=np.concatenate([tile.labels for tile in tiles])[kept],
        photometric=_covering(tiles[0].photometric, whole, mean_grey),
        teacher_scores=np.concatenate([tile.scores for tile in tiles])[kept],
    )


def mixup(sample: Sample, other: Sample, weight: float) -> Sample:
    """Blend two samples, `other` with `weight`; the boxes of both count in full.

    Source: arXiv:1902.04103.
    """
    greys = [each.photometric[Photometric.MEAN_GREY] for each in (sample, other)]
    return Sample(
        image=np.asarray(cv2.addWeighted(sample.image, 1 - weight, other.image, weight, 0), np.uint8),
        boxes=np.concatenate([sample.boxes, other.boxes]),
        labels=np.concatenate([sample.labels, other.labels]),
        photometric=_covering(sample.photometric, _united(sample, other), (1 - weight) * greys[0] + weight * greys[1]),
        teacher_scores=np.concatenate([sample.scores, other.scores]),
    )


def copy_paste(sample: Sample, other: Sample, pasted: NDArray[np.bool_], max_covered: float) -> Sample:
    """Paste boxes of `other`, with all pixels inside them, at the same position in `sample`.

    Args:
        pasted: mask [G] of the objects of `other` to paste.
        max_covered: objects covered by more than this fraction are dropped.

    Source: Simple Copy-Paste, arXiv:2012.07177, with boxes in place of masks.
    """
    height, width = sample.image.shape[:2]
    image, boxes, labels = sample.image.copy(), sample.boxes, sample.labels
    for box, label in zip(other.boxes[pasted], other.labels[pasted], strict=True):
        kept = _covered_fraction(boxes, box) <= max_covered
        boxes, labels = np.concatenate([boxes[kept], box[np.newaxis]]), np.append(labels[kept], label)
        left, top, right, bottom = (_corners(box) * np.array([width, height] * 2)).round().astype(int)
        image[top:bottom, left:right] = other.image[top:bottom, left:right]
    region = _united(sample, other) if pasted.any() else Rectangle(*sample.photometric[Photometric.LEFT :].astype(int))
    photometric = _covering(sample.photometric, region, float(sample.photometric[Photometric.MEAN_GREY]))
    return Sample(image=image, boxes=boxes, labels=labels, photometric=photometric)


def _mixed(index: int, samples: Sequence[Sample], generator: np.random.Generator, settings: AugmentSettings) -> Sample:
    """One sample after its random mixing; the draws are in a fixed order, as they share one generator."""
    others = np.delete(np.arange(len(samples)), index)
    height, width = samples[index].image.shape[:2]
    sample = samples[index]
    if generator.random() < settings.mosaic_probability:
        four = np.append(generator.choice(others, 3, replace=len(others) < 3), index)
        tiles = [samples[tile] for tile in generator.permutation(four)]
        centre_x, centre_y = (round(side * generator.uniform(*settings.mosaic_centre)) for side in (width, height))
        sample = mosaic(tiles, centre_x, centre_y, settings.min_box_size)
    if generator.random() < settings.copy_paste_probability:
        other = samples[generator.choice(others)]
        pasted = generator.random(len(other.labels)) < settings.copy_paste_object_probability
        sample = copy_paste(sample, other, pasted, settings.copy_paste_max_covered)
    if generator.random() < settings.mixup_probability:
        sample = mixup(sample, samples[generator.choice(others)], generator.uniform(*settings.mixup_weight))
    return sample


def _covering(photometric: NDArray[np.float32], region: Rectangle, mean_grey: float) -> NDArray[np.float32]:
    """The same parameters for an image that fills `region`."""
    row = photometric.copy()
    row[Photometric.LEFT :] = region
    row[Photometric.MEAN_GREY] = mean_grey
    return row


def _united(sample: Sample, other: Sample) -> Rectangle:
    """The smallest rectangle that holds the image parts of both canvases."""
    regions = np.stack([sample.photometric[Photometric.LEFT :], other.photometric[Photometric.LEFT :]]).astype(int)
    (left, top), (right, bottom) = regions[:, :2].min(axis=0), regions[:, 2:].max(axis=0)
    return Rectangle(int(left), int(top), int(right), int(bottom))


def _corners(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Convert cxcywh to xyxy, along the last axis."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return np.concatenate([centre - half, centre + half], axis=-1)


def _covered_fraction(boxes: NDArray[np.float32], cover: NDArray[np.float32]) -> NDArray[np.float32]:
    """Fraction [G] of each box [G, 4] that lies under one box [4], all cxcywh."""
    inner, outer = _corners(boxes), _corners(cover)
    overlap = np.minimum(inner[:, 2:], outer[2:]) - np.maximum(inner[:, :2], outer[:2])
    return overlap.clip(min=0).prod(axis=1) / boxes[:, 2:].prod(axis=1)

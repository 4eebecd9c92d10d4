"""A detector that finds plain rectangles by their pixels: what any tile shows, without a training."""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor

from dfine_core import LoadedDetector
from dfine_core.image_detections import RawDetections
from tests.support.small_detectors import small_detector

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))  # one for each class


@dataclass(frozen=True, eq=False, repr=False)
class SeeingDetector(LoadedDetector):
    """Finds each connected area of a class's colour; its score grows with the number of its pixels."""

    def find(self, pixels: Tensor, sizes: Tensor) -> list[RawDetections]:
        return [self._of_image(image.numpy(), size) for image, size in zip(pixels, sizes, strict=True)]

    def _of_image(self, pixels: NDArray[np.uint8], size: Tensor) -> RawDetections:
        scale = size.numpy() / pixels.shape[:0:-1]
        rows = []
        for label, colour in enumerate(COLOURS):
            areas, _ = ndimage.label((pixels == np.array(colour, np.uint8)[:, None, None]).all(0))
            for down, right in ndimage.find_objects(areas):
                box = np.array([right.start, down.start, right.stop, down.stop]) * np.tile(scale, 2)
                rows.append((1 - 1 / (2 + (box[2:] - box[:2]).prod()), label, box))
        rows.sort(key=lambda row: -row[0])
        return RawDetections(
            boxes=torch.tensor(np.array([box for *_, box in rows]).reshape(-1, 4), dtype=torch.float32),
            scores=torch.tensor([score for score, *_ in rows], dtype=torch.float32),
            labels=torch.tensor([label for _, label, _ in rows], dtype=torch.int64),
            size=size,
            queries=None,
            edge_logits=None,
            initial_boxes=None,
        )


def seeing_detector(side: int) -> SeeingDetector:
    """A detector whose input has this side."""
    small = small_detector([f"colour {label}" for label in range(len(COLOURS))])
    own = {field.name: getattr(small, field.name) for field in fields(LoadedDetector)}
    config = replace(small.config, input_size=(side, side))
    small.detector.config = config
    return SeeingDetector(**own)


def picture(size: tuple[int, int], boxes: list[tuple[int, int, int, int]], labels: list[int]) -> Image.Image:
    """Rectangles on black."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    for (left, top, right, bottom), label in zip(boxes, labels, strict=True):
        pixels[top:bottom, left:right] = COLOURS[label]
    return Image.fromarray(pixels)

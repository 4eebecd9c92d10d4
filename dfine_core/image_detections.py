"""Detections of single images: all of them as the network found them, and those that were kept."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dfine_core.config import IntervalKind
from dfine_core.drawing import Rectangle, draw_boxes
from dfine_core.images import ImageSource, OpenedImage, read_image


class DetectedBox(NamedTuple):
    """One detection as plain values."""

    box: tuple[float, float, float, float]  # xyxy in pixels of the stored image
    score: float
    label: int
    name: str


@dataclass(frozen=True, eq=False)
class ImageDetections:
    """Detections of one image, best first; on the CPU. Iterating gives them one by one as plain values."""

    boxes: Tensor  # [K, 4] float32 xyxy in pixels of the image as it is stored; may reach over its border
    scores: Tensor  # [K] in [0, 1]; calibrated where the detector is
    labels: Tensor  # [K] int64
    names: tuple[str, ...]  # [K]
    edge_std_px: Tensor | None = None  # [K, 4] of the left, top, right, bottom edge; with a calibration or a coverage
    # NaN for an edge that is not known, see `merge_tiles`
    edge_intervals: Tensor | None = None  # [K, 4, 2] lowest and highest coordinate of each edge, px; with a coverage
    intervals: IntervalKind | None = None  # source of the intervals

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[DetectedBox]:
        rows = zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), self.names, strict=True)
        return (DetectedBox(tuple(box), score, label, name) for box, score, label, name in rows)

    def draw(self, image: ImageSource) -> OpenedImage:
        """Draw the boxes with names and scores into a copy of the image they were found in; with intervals, their bands too.

        Raises:
            ValueError: the image cannot be read.
        """
        captions = [f"{name} {score:.2f}" for name, score in zip(self.names, self.scores.tolist(), strict=True)]
        bands = () if self.edge_intervals is None else [inner_outer(row) for row in self.edge_intervals.tolist()]
        return draw_boxes(read_image(image), self.boxes.tolist(), self.labels.tolist(), captions, bands=bands)


@dataclass(frozen=True, eq=False)
class RawDetections:
    """All detections of one image, best first, before any threshold or calibration, with the distributions of their edges."""

    boxes: Tensor  # [R, 4] xyxy in pixels; on the CPU, as labels and scores are
    scores: Tensor  # [R]
    labels: Tensor  # [R]
    size: Tensor  # [2] (width, height) of the image, on the CPU
    queries: Tensor | None  # [R] rows of the next two, which lie on the detector's device
    edge_logits: Tensor | None  # [Q, 4, N]; None with direct regression
    initial_boxes: Tensor | None  # [Q, 4] cxcywh, normalised


def inner_outer(interval: list[list[float]]) -> tuple[Rectangle, Rectangle]:
    """Smallest and largest box of four intervals [4][2]: left, top, right, bottom."""
    left, top, right, bottom = interval
    return (left[1], top[1], right[0], bottom[0]), (left[0], top[0], right[1], bottom[1])

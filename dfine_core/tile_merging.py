"""Detections of an image from those of its tiles: each object once, with what is known about each of its edges.

A detection that ends at an inner border of its tile is *cut*: the object may go on beyond. Three rules, in this order:

1. A cut detection that another tile shows wholly, clear of its own inner borders, is dropped, whatever its class: that tile has
   seen the same and more.
2. Two detections of one class and of different tiles are one object if their boxes agree where both tiles look. Both are
   clipped to the overlap of the tiles if one of them is cut. The better score stays, and edges that are cut in one are taken
   from the other; so an object that fits into no tile is joined from its parts.
3. An edge that is cut in all parts is not known: its deviation is NaN, and its interval reaches to the border of the image.

Detections of the same tile are never compared, as the network needs no suppression. A single tile is returned as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dfine_core.image_detections import ImageDetections
from dfine_core.tiles import Tile

BORDER = 0.01  # share of a tile's side: an edge this near to an inner border is cut
SAME_IOU = 0.5  # least IoU of two boxes of one object
LOW = np.array([True, True, False, False])  # edges that are lower coordinates: left and top

Floats = NDArray[np.float32]


@dataclass
class _Parts:
    """Detections of all tiles side by side, K in pixels of the image; edges change as objects are joined."""

    boxes: Floats  # [K, 4]
    scores: Floats  # [K]
    labels: NDArray[np.int64]  # [K]
    tile: NDArray[np.int64]  # [K] index of the tile
    cut: NDArray[np.bool_]  # [K, 4] edges that are not known
    std: Floats | None  # [K, 4]
    intervals: Floats | None  # [K, 4, 2]

    def take_edges(self, into: int, source: int) -> None:
        """Complete a detection by another one of the same object: known edges, and of two cut ones the outer one."""
        theirs, own = self.boxes[source], self.boxes[into]
        outer = np.where(LOW, theirs < own, theirs > own)
        better = self.cut[into] & (~self.cut[source] | outer)
        self.boxes[into, better] = theirs[better]
        if self.std is not None:
            self.std[into, better] = self.std[source, better]
        if self.intervals is not None:
            self.intervals[into, better] = self.intervals[source, better]
        self.cut[into] &= self.cut[source]


def merge_tiles(found: Sequence[ImageDetections], tiles: Sequence[Tile], size: tuple[int, int]) -> ImageDetections:
    """Merge the detections of the tiles of one image.

    Args:
        found: for each tile, in pixels of the tile.
        size: width and height of the image.
    """
    if len(tiles) == 1:
        return found[0]
    borders = np.array(tiles, np.float32)  # [T, 4]
    inner = np.array([tile.inner(size) for tile in tiles])  # [T, 4]
    margin: Floats = np.float32(BORDER) * np.tile(borders[:, 2:] - borders[:, :2], 2)  # [T, 4]
    parts = _laid_out(found, borders, inner, margin)
    first = _shown_wholly_elsewhere(parts, borders, inner, margin)
    order = [index for index in np.argsort(-parts.scores, kind="stable").tolist() if not first[index]]
    kept = _distinct(parts, order, borders)
    return _as_detections(parts, np.array(kept, np.int64), found, size)


def _laid_out(found: Sequence[ImageDetections], borders: Floats, inner: NDArray[np.bool_], margin: Floats) -> _Parts:
    """Move the detections of all tiles to the image, and mark the edges that are cut."""
    tile = np.repeat(np.arange(len(found)), [len(each) for each in found])
    offset = np.tile(borders[tile, :2], 2)  # [K, 4]
    boxes = torch.cat([each.boxes for each in found]).numpy() + offset
    beyond = np.where(LOW, boxes <= (borders + margin)[tile], boxes >= (borders - margin)[tile])
    std = [each.edge_std_px for each in found if each.edge_std_px is not None]
    intervals = [each.edge_intervals for each in found if each.edge_intervals is not None]
    return _Parts(
        boxes=boxes,
        scores=torch.cat([each.scores for each in found]).numpy(),
        labels=torch.cat([each.labels for each in found]).numpy(),
        tile=tile,
        cut=inner[tile] & beyond,
        std=torch.cat(std).numpy().copy() if std else None,
        intervals=torch.cat(intervals).numpy() + offset[:, :, None] if intervals else None,
    )


def _shown_wholly_elsewhere(
    parts: _Parts, borders: Floats, inner: NDArray[np.bool_], margin: Floats
) -> NDArray[np.bool_]:
    """Mask [K] of the cut detections that lie inside another tile, clear of its inner borders."""
    own = borders[parts.tile]
    boxes = np.concatenate([np.maximum(parts.boxes[:, :2], own[:, :2]), np.minimum(parts.boxes[:, 2:], own[:, 2:])], 1)
    shown = np.zeros(len(boxes), np.bool_)
    for index, border in enumerate(borders):
        clear = np.where(LOW, boxes > border + margin[index], boxes < border - margin[index])
        shown |= (clear | ~inner[index]).all(1) & (parts.tile != index)
    return shown & parts.cut.any(1)


def _distinct(parts: _Parts, order: Sequence[int], borders: Floats) -> list[int]:
    """Indices of the detections that stay, one for each object, in the given order; they take over known edges."""
    overlapping = [np.flatnonzero(_areas(_shared(border, borders)) > 0).tolist() for border in borders]
    kept_in: dict[tuple[int, int], list[int]] = {}  # by tile and label; joined ones are in the tiles of all their parts
    kept: list[int] = []
    for index in order:
        tile, label = int(parts.tile[index]), int(parts.labels[index])
        rivals = [
            (other, neighbour)
            for neighbour in overlapping[tile]
            if neighbour != tile
            for other in kept_in.get((neighbour, label), ())
            if parts.tile[other] != tile
        ]
        if rivals:
            agreement = _agreement(parts, index, np.array(rivals), borders)
            best = int(agreement.argmax())
            if agreement[best] >= SAME_IOU:
                parts.take_edges(rivals[best][0], index)
                kept_in.setdefault((tile, label), []).append(rivals[best][0])
                continue
        kept.append(index)
        kept_in.setdefault((tile, label), []).append(index)
    return kept


def _agreement(parts: _Parts, index: int, rivals: NDArray[np.int64], borders: Floats) -> Floats:
    """IoU of a box with others, [n]; where one of the two is cut, of what both tiles show of them.

    Args:
        rivals: [n, 2] the others, and for each the tile that it is compared in.
    """
    others, tiles = rivals.T
    box, theirs = parts.boxes[[index]], parts.boxes[others]
    both = _shared(borders[parts.tile[index]], borders[tiles])
    limited = (parts.cut[index].any() | parts.cut[others].any(1))[:, None]
    box, theirs = np.where(limited, _shared(box, both), box), np.where(limited, _shared(theirs, both), theirs)
    common = _areas(_shared(box, theirs))
    union = _areas(box) + _areas(theirs) - common
    iou: Floats = np.divide(common, union, out=np.zeros_like(common), where=union > 0)
    return iou


def _shared(one: Floats, other: Floats) -> Floats:
    """Intersections of rectangles [..., 4]; those that do not touch become inside out."""
    low, high = np.maximum(one[..., :2], other[..., :2]), np.minimum(one[..., 2:], other[..., 2:])
    return np.concatenate([low, high], -1)


def _areas(boxes: Floats) -> Floats:
    sides: Floats = np.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    area: Floats = sides.prod(-1)
    return area


def _as_detections(
    parts: _Parts, kept: NDArray[np.int64], found: Sequence[ImageDetections], size: tuple[int, int]
) -> ImageDetections:
    cut = parts.cut[kept]
    std, intervals = parts.std, parts.intervals
    if std is not None:
        std = np.where(cut, np.float32(np.nan), std[kept])
    if intervals is not None:
        reach = np.array([[0, np.nan], [0, np.nan], [np.nan, size[0]], [np.nan, size[1]]], np.float32)
        open_ended = np.where(np.isnan(reach), intervals[kept], reach)  # outward alone
        intervals = np.where(cut[:, :, None], open_ended, intervals[kept])
    names = [name for each in found for name in each.names]
    return ImageDetections(
        boxes=torch.from_numpy(parts.boxes[kept]),
        scores=torch.from_numpy(parts.scores[kept]),
        labels=torch.from_numpy(parts.labels[kept]),
        names=tuple(names[index] for index in kept),
        edge_std_px=None if std is None else torch.from_numpy(std),
        edge_intervals=None if intervals is None else torch.from_numpy(intervals),
        intervals=next((each.intervals for each in found if each.intervals is not None), None),
    )

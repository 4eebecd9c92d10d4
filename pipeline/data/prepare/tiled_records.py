"""Tiles of an image as rows of a shard, with the boxes that can be learned from each of them.

A box that a tile cuts is kept, cut off at the tile's border, if at least MIN_SHARE of its area is visible, or if what is
visible is at least MIN_SIDE of the tile wide and high. Otherwise its visible part becomes a region to ignore: a crowd region of
weight 0, where training teaches neither object nor background. Crowd regions are cut and stay crowd regions.

A tile has the id TILE_IDS * (id of its image) + (number of the tile, row by row), and the name of its image with its corner,
such as "street.jpg#tile=512,0". An image that is no larger than a tile stays as it is, with the number 0 and its own name.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dfine_core.images import OpenedImage, open_image, to_rgb
from dfine_core.tiles import DEFAULT_OVERLAP, LARGEST_OVERLAP, SMALLEST_TILE, Tile, Tiling
from pipeline.data.shards.manifest import FrozenModel, Notice
from pipeline.data.shards.records import ImageRecord

MIN_SHARE = 0.4  # least visible share of a box's area
MIN_SIDE = 0.1  # least visible width and height, as a share of the tile's side
TILE_IDS = 1_000_000  # ids per image, more than any image has tiles
LARGEST_ID = (2**63 - 1) // TILE_IDS - 1  # largest id of an image that is cut
QUALITY = 95  # JPEG quality of tiles, which are written anew


class TileRule(FrozenModel):
    """Cutting of the images of a shard set."""

    side: int = Field(ge=SMALLEST_TILE)  # px
    overlap: float = Field(default=DEFAULT_OVERLAP, ge=0, le=LARGEST_OVERLAP)
    empty: float = Field(default=1.0, ge=0, le=1)  # share of the tiles without boxes that is kept

    @property
    def tiling(self) -> Tiling:
        """Tiles of the images."""
        return Tiling(self.side, self.overlap)


def tiled_records(record: ImageRecord, rule: TileRule, seed: int, notices: list[Notice]) -> Iterator[ImageRecord]:
    """Yield the tiles of an image as rows; what was done to boxes and empty tiles is added to `notices`.

    Args:
        seed: decides with the id which empty tiles are kept.
    """
    tiles = rule.tiling.tiles((record.width, record.height))
    numbered = replace(record, image_id=TILE_IDS * record.image_id)
    weights = np.ones(len(record.labels), np.float32) if record.weights is None else record.weights
    whole = replace(numbered, weights=weights)
    image = _decoded(record.image) if len(tiles) > 1 else None
    for number, tile in enumerate(tiles):
        row = whole if image is None else _tile_row(whole, tile, number, rule.side, notices)
        if not len(row.labels) and _share(seed, row.image_id) >= rule.empty:
            notices.append(Notice(code="tile-empty", count=1, example=row.file_name))
            continue
        yield row if image is None else replace(row, image=_encoded(tile.cut(image)))


def in_shard_order(records: Sequence[ImageRecord], seed: int, *, shuffle: bool) -> list[ImageRecord]:
    """Order of the tiles of all images of a shard: shuffled, so that neighbours in a row group are unrelated, or as they are."""
    return sorted(records, key=lambda record: _digest(seed, record.image_id)) if shuffle else list(records)


def tiled_bytes(size: tuple[int, int], stored: int, rule: TileRule) -> int:
    """Estimate the bytes of all tiles of an image from those of its file."""
    tiles = rule.tiling.tiles(size)
    return round(stored * sum(tile.size[0] * tile.size[1] for tile in tiles) / (size[0] * size[1]))


def _tile_row(record: ImageRecord, tile: Tile, number: int, side: int, notices: list[Notice]) -> ImageRecord:
    """Row of a tile, with the bytes of the whole image still."""
    size = record.width, record.height
    name = f"{record.file_name}#tile={tile.left},{tile.top}"
    visible, share = _visible(record.boxes, tile, size)
    sides = visible[:, 2:] - visible[:, :2]
    seen = (sides > 0).all(1)
    cut = seen & (share < 1)
    learned = ~cut | (share >= MIN_SHARE) | (sides >= MIN_SIDE * side).all(1) | record.crowd
    for code, mask in (("tile-box-cut", cut & learned & ~record.crowd), ("tile-box-ignored", cut & ~learned)):
        if mask.any():
            notices.append(Notice(code=code, count=int(mask.sum()), example=name))
    assert record.weights is not None
    return replace(
        record,
        image_id=record.image_id + number,
        file_name=name,
        width=tile.size[0],
        height=tile.size[1],
        boxes=(_cut(record.boxes, tile, size) - np.array([tile.left, tile.top] * 2, np.float32))[seen],
        labels=record.labels[seen],
        areas=(record.areas * share)[seen],
        crowd=(record.crowd | ~learned)[seen],
        weights=np.where(learned, record.weights, np.float32(0))[seen],
    )


def _visible(
    boxes: NDArray[np.float32], tile: Tile, size: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Part of each box in a tile, [G, 4], inside out where there is none; and its share of the box's part in the image, [G]."""
    whole = np.concatenate([np.maximum(boxes[:, :2], 0), np.minimum(boxes[:, 2:], np.array(size, np.float32))], 1)
    corners = np.array(tile, np.float32)
    part = np.concatenate([np.maximum(whole[:, :2], corners[:2]), np.minimum(whole[:, 2:], corners[2:])], 1)
    areas = [np.maximum(each[:, 2:] - each[:, :2], 0).prod(1) for each in (part, whole)]
    # Sides decide, as a quotient of areas may round to 1.
    share = np.where((part == whole).all(1), 1, np.minimum(areas[0] / np.maximum(areas[1], 1e-9), np.float32(1 - 1e-6)))
    return part, share.astype(np.float32)


def _cut(boxes: NDArray[np.float32], tile: Tile, size: tuple[int, int]) -> NDArray[np.float32]:
    """Boxes [G, 4] cut off at inner borders of a tile; beyond the image they stay as annotated."""
    inner = np.array(tile.inner(size))
    limit = np.where(inner, np.array(tile, np.float32), np.array([-np.inf, -np.inf, np.inf, np.inf], np.float32))
    return np.concatenate([np.maximum(boxes[:, :2], limit[:2]), np.minimum(boxes[:, 2:], limit[2:])], 1)


def _decoded(content: bytes) -> OpenedImage:
    with open_image(content, max_pixels=None) as image:  # checked before
        return to_rgb(image, upright=False)


def _encoded(image: OpenedImage) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def _digest(seed: int, image_id: int) -> bytes:
    return hashlib.blake2b(f"tile {seed} {image_id}".encode(), digest_size=8).digest()


def _share(seed: int, image_id: int) -> float:
    return int.from_bytes(_digest(seed, image_id)) / 2**64

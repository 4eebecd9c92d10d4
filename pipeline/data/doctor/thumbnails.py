"""Thumbnails of images from shards, with their boxes, for the HTML report."""

import base64
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from dfine_core.drawing import Rectangle, place_caption
from pipeline.data.augment.decode import UndecodableImageError, decode_rgb, image_size
from pipeline.data.doctor.shard_checks import READ_ERRORS
from pipeline.data.shards.manifest import ShardSet
from pipeline.data.shards.reader import locate_row_groups, read_row_groups
from pipeline.data.shards.records import ImageRecord, records_from_table
from pipeline.drawing import css_colour, font

THUMBNAIL_SIDE = 720  # px, longer side
THUMBNAIL_QUALITY = 80
FONT_SIZE = 20  # px, of which widths are measured
MOST_NAMES = 12  # with more boxes the names would cover the thumbnail
TEXT_SHARE, LINE, BASELINE = 0.042, 1.25, 0.95  # size of names, of the view; height and baseline of a line, of the size
MARGIN = 0.15  # fraction of the image; boxes beyond its edge are visible up to here

View = tuple[float, float, float, float]  # left, top, width, height in image pixels


@dataclass(frozen=True)
class BoxOverlay:
    """A box to render over its image."""

    left: float  # image pixels, as the next three
    top: float
    width: float
    height: float
    name: str
    colour: str  # CSS
    crowd: bool
    marked: bool
    # Name, in image pixels: left, baseline and width; 0 where it is left out.
    text_x: float = 0.0
    text_y: float = 0.0
    text_width: float = 0.0


@dataclass(frozen=True)
class Thumbnail:
    """An image with its boxes, ready for the template."""

    caption: str
    source: str | None  # a data URI, None if the image cannot be decoded
    width: int  # image pixels
    height: int
    view: View  # the visible area, which may exceed the image
    boxes: tuple[BoxOverlay, ...]
    text_size: float  # image pixels
    named: bool  # few enough boxes to write their names
    contents: str  # number of boxes per class


def sample_rows(shard_sets: Sequence[ShardSet], count: int, seed: int) -> Iterator[tuple[int, int, int]]:
    """Sample (shard set, shard, row) of images without replacement, equally many from each set."""
    rng = np.random.default_rng(seed)
    for number, shards in enumerate(shard_sets):
        ends = np.cumsum([shard.rows for shard in shards.manifest.shards])
        images = shards.manifest.images
        for n in rng.choice(images, min(images, math.ceil(count / len(shard_sets))), replace=False):
            shard = int(np.searchsorted(ends, n, side="right"))
            yield number, shard, int(n - ends[shard] + shards.manifest.shards[shard].rows)


def thumbnail(shards: ShardSet, shard: int, row: int, marked: Iterable[int | None] = ()) -> Thumbnail | None:
    """Read one image with its boxes; None if its row cannot be read.

    Args:
        marked: indices of boxes to highlight.
    """
    record = _read_record(shards, shard, row)
    if record is None:
        return None
    categories = shards.manifest.categories
    marks = set(marked)
    overlays = tuple(
        BoxOverlay(
            left=float(box[0]),
            top=float(box[1]),
            width=float(max(0, box[2] - box[0])),
            height=float(max(0, box[3] - box[1])),
            name=categories[label].name if 0 <= label < len(categories) else f"label {label}",
            colour=css_colour(label),
            crowd=bool(crowd),
            marked=g in marks,
        )
        for g, (box, label, crowd) in enumerate(zip(record.boxes, record.labels.tolist(), record.crowd, strict=True))
        if np.isfinite(box).all()
    )
    # The stored size, unless the image is damaged.
    try:
        width, height = image_size(record.image)
        source = _data_uri(decode_rgb(record.image, width, height))
    except UndecodableImageError:
        width, height, source = max(1, record.width), max(1, record.height), None
    view = _view(record.boxes, width, height)
    text_size = max(view[2], 1.2 * view[3]) * TEXT_SHARE
    named = len(overlays) <= MOST_NAMES
    overlays, view = place_names(overlays, view, text_size, named=named)
    return Thumbnail(
        caption=f"{shards.manifest.split} {record.image_id}: {record.file_name}, {width} x {height}",
        source=source,
        width=width,
        height=height,
        view=view,
        boxes=overlays,
        text_size=text_size,
        named=named,
        contents=", ".join(f"{count} {name}" for name, count in Counter(box.name for box in overlays).most_common()),
    )


def place_names(
    boxes: Sequence[BoxOverlay], view: View, text_size: float, *, named: bool
) -> tuple[tuple[BoxOverlay, ...], View]:
    """Place names where they cover no part of their own boxes; the view grows upwards where a box fills it.

    Args:
        named: name every box, not the marked ones alone.
    """
    placed, covers = _placed(boxes, view, view, text_size, named)
    if not covers:
        return placed, view
    line = 1.1 * LINE * text_size
    grown = view[0], view[1] - line, view[2], view[3] + line
    return _placed(boxes, view, grown, text_size, named)[0], grown


def _placed(
    boxes: Sequence[BoxOverlay], view: View, grown: View, text_size: float, named: bool
) -> tuple[tuple[BoxOverlay, ...], bool]:
    """Place names in `grown` beside the visible part of boxes, and return whether one covers its box."""
    left, top, areas, result, covers = grown[0], grown[1], list[Rectangle](), list[BoxOverlay](), False
    for box in boxes:
        visible = (
            max(box.left, view[0]) - left,
            max(box.top, view[1]) - top,
            min(box.left + box.width, view[0] + view[2]) - left,
            min(box.top + box.height, view[1] + view[3]) - top,
        )
        if not (named or box.marked) or visible[0] >= visible[2] or visible[1] >= visible[3]:
            result.append(box)  # a box beyond the view has no name in it
            continue
        text_width = min(font(FONT_SIZE).getlength(box.name) * text_size / FONT_SIZE, view[2])
        area = place_caption(visible, (text_width, LINE * text_size), grown[2:], areas)
        areas.append(area)
        across, down = (min(area[n + 2], visible[n + 2]) - max(area[n], visible[n]) for n in (0, 1))
        covers = covers or (across > 0 and down > 0)
        x, y = left + area[0], top + area[1] + BASELINE * text_size
        result.append(replace(box, text_x=x, text_y=y, text_width=text_width))
    return tuple(result), covers


def _read_record(shards: ShardSet, shard: int, row: int) -> ImageRecord | None:
    source = locate_row_groups(shards)
    begins = np.cumsum(shards.manifest.shards[shard].row_groups)
    index = int(np.searchsorted(begins, row, side="right"))
    (group,) = np.flatnonzero((source.shard == shard) & (source.index == index)).tolist()
    try:
        table = read_row_groups(source, [group])[group]
        one = table.slice(row - (begins[index] - len(table)), 1)
        (record,) = records_from_table(one.drop_null())
    except (*READ_ERRORS, ValueError):  # a damaged shard, or a row whose values are missing or mixed up
        return None
    return record


def _view(boxes: NDArray[np.float32], width: int, height: int) -> View:
    corners = boxes[np.isfinite(boxes).all(1)].reshape(-1, 2)
    size = np.array([width, height])
    low = np.minimum(corners.min(0, initial=0), 0).clip(-MARGIN * size)
    high = np.maximum(corners.max(0, initial=0), size).clip(max=(1 + MARGIN) * size)
    return float(low[0]), float(low[1]), float(high[0] - low[0]), float(high[1] - low[1])


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    height, width, _ = pixels.shape
    scale = min(1.0, THUMBNAIL_SIDE / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = np.ascontiguousarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))
    encoded = simplejpeg.encode_jpeg(small, quality=THUMBNAIL_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(encoded).decode()

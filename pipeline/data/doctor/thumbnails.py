"""Images of shards as small pictures with their boxes, ready for a page."""

import base64
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline.data.augment.decode import UndecodableImageError, decode_rgb, image_size
from pipeline.data.doctor.shard_checks import READ_ERRORS
from pipeline.data.shards.manifest import ShardSet
from pipeline.data.shards.reader import locate_row_groups, read_row_groups
from pipeline.data.shards.records import ImageRecord, records_from_table
from pipeline.drawing import css_colour

PICTURE_SIDE = 400  # px, the longer one
PICTURE_QUALITY = 80
MOST_NAMES = 12  # with more boxes the names would cover the picture
MARGIN = 0.15  # of the image, in which boxes beyond its edge are still shown


@dataclass(frozen=True)
class DrawnBox:
    left: float  # px of the image, as are the others
    top: float
    width: float
    height: float
    name: str
    colour: str  # of CSS
    crowd: bool
    marked: bool


@dataclass(frozen=True)
class Picture:
    caption: str
    source: str | None  # a data URI, None if the image cannot be decoded
    width: int  # px of the image
    height: int
    view: tuple[float, float, float, float]  # left, top, width, height of what is shown: boxes may pass the edge
    boxes: tuple[DrawnBox, ...]
    named: bool  # whether names fit in
    contents: str  # how many of what


def chosen_rows(shard_sets: Sequence[ShardSet], count: int, seed: int) -> Iterator[tuple[int, int, int]]:
    """(shard set, shard, row) of some images: equally many of each set, none twice."""
    rng = np.random.default_rng(seed)
    for number, shards in enumerate(shard_sets):
        ends = np.cumsum([shard.rows for shard in shards.manifest.shards])
        images = shards.manifest.images
        for n in rng.choice(images, min(images, math.ceil(count / len(shard_sets))), replace=False):
            shard = int(np.searchsorted(ends, n, side="right"))
            yield number, shard, int(n - ends[shard] + shards.manifest.shards[shard].rows)


def picture(shards: ShardSet, shard: int, row: int, marked: Iterable[int | None] = ()) -> Picture | None:
    """One image with its boxes; None if its row cannot be read.

    Args:
        marked: boxes to point out.
    """
    record = _read(shards, shard, row)
    if record is None:
        return None
    categories = shards.manifest.categories
    marks = set(marked)
    drawn = tuple(
        DrawnBox(
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
    try:
        width, height = image_size(record.image)
        source = _data_uri(decode_rgb(record.image, width, height))
    except UndecodableImageError:
        width, height, source = max(1, record.width), max(1, record.height), None
    return Picture(
        caption=f"{shards.manifest.split} {record.image_id}: {record.file_name}, {width} x {height}",
        source=source,
        width=width,
        height=height,
        view=_view(record.boxes, width, height),
        boxes=drawn,
        named=len(drawn) <= MOST_NAMES,
        contents=", ".join(f"{count} {name}" for name, count in Counter(box.name for box in drawn).most_common()),
    )


def _read(shards: ShardSet, shard: int, row: int) -> ImageRecord | None:
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


def _view(boxes: NDArray[np.float32], width: int, height: int) -> tuple[float, float, float, float]:
    corners = boxes[np.isfinite(boxes).all(1)].reshape(-1, 2)
    size = np.array([width, height])
    low = np.minimum(corners.min(0, initial=0), 0).clip(-MARGIN * size)
    high = np.maximum(corners.max(0, initial=0), size).clip(max=(1 + MARGIN) * size)
    return float(low[0]), float(low[1]), float(high[0] - low[0]), float(high[1] - low[1])


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    height, width, _ = pixels.shape
    scale = min(1.0, PICTURE_SIDE / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = np.ascontiguousarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))
    encoded = simplejpeg.encode_jpeg(small, quality=PICTURE_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(encoded).decode()

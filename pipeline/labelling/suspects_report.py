"""Likely label errors as text, JSON, CSV, and a page with crops, the surest first."""

import base64
import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline import html_pages, storage
from pipeline.data.augment.decode import UndecodableImageError, decode_rgb
from pipeline.data.shards.manifest import ShardSet
from pipeline.data.shards.reader import locate_row_groups, read_row_groups
from pipeline.data.shards.training_set import trains_on
from pipeline.errors import UserError
from pipeline.labelling.suspects import KINDS, Corners, Suspect
from pipeline.wording import plural

SHOWN_LINES, SHOWN_CROPS = 30, 200
CONTEXT, LEAST_CONTEXT_PX = 0.8, 24  # around the boxes of a crop: a share of their longer side
CROP_SIDE, CROP_QUALITY = 360, 85  # px of the longer side
IMAGE_COLUMNS = ("width", "height", "image")

MEANINGS = {
    "missing": "a confident detection with no box near it",
    "extra": "a box that no detection supports",
    "class": "a box on which the detector is sure of another class",
    "edges": "an edge outside the interval that holds 99 % of the true ones",
}


@dataclass(frozen=True)
class LabelReport:
    """Result of `dfine doctor --model`."""

    detector: str
    shards: str  # URI
    digest: str
    images: int
    boxes: int
    calibrated: bool
    memorised: bool  # the detector was trained on this shard set
    suspects: tuple[Suspect, ...]

    def to_plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return vars(self) | {"suspects": [suspect.to_plain() for suspect in self.suspects]}

    def lines(self) -> list[str]:
        """What was judged, by what, and how far it can be believed."""
        counts = Counter(suspect.kind for suspect in self.suspects)
        listed = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind])
        lines = [
            f"{plural(len(self.suspects), 'likely label error')} among {plural(self.boxes, 'box')} of"
            f" {plural(self.images, 'image')}" + (f": {listed}" if listed else ""),
            f"{self.shards}, judged by {self.detector}, {'calibrated' if self.calibrated else 'not calibrated'}",
        ]
        if self.memorised:
            lines.append(
                "This detector was trained on these boxes and repeats their errors, so that most of them are not listed."
                " Judge images that it has not seen: train on one half, judge the other, and the other way round"
                " (dfine prepare --split-off other=0.5)"
            )
        return lines


def trained_on(loaded_path: str | None, shards: ShardSet) -> bool:
    """Whether the checkpoint of these weights names the shard set as its training data."""
    if loaded_path is None:
        return False
    uri = storage.join(loaded_path.rpartition("/")[0], "metadata.json")
    try:
        data = storage.read_json(uri, "data")["data"] if storage.exists(uri) else {}
    except UserError:
        return False  # no checkpoint of a run
    return isinstance(data, dict) and trains_on(data, shards.manifest.digest)


def report_text(report: LabelReport) -> str:
    """Format the report for a terminal."""
    lines = report.lines()
    for suspect in report.suspects[:SHOWN_LINES]:
        place = f"image {suspect.image_id} {suspect.file_name}" + (
            "" if suspect.box is None else f", box {suspect.box}"
        )
        lines.append(f"  {suspect.confidence:.2f} {suspect.kind:8}{place}: {suspect.detail}")
    if (more := len(report.suspects) - SHOWN_LINES) > 0:
        lines.append(f"  and {more:,} more: --json prints all, --csv and --html write them")
    return "\n".join(lines)


def report_json(report: LabelReport) -> str:
    """Format the report as JSON."""
    return json.dumps(report.to_plain())


def report_csv(report: LabelReport) -> bytes:
    """Format the suspects as CSV, with boxes as four columns each."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    sides = ("left", "top", "right", "bottom")
    plain = ("kind", "confidence", "image_id", "file_name", "box", "labelled", "detected")
    boxes = ("annotated", "suggested")
    writer.writerow([*plain, *(f"{box}_{side}" for box in boxes for side in sides), "detail"])
    for suspect in report.suspects:
        row = suspect.to_plain()
        corners = [value for box in boxes for value in (row[box] or [""] * 4)]
        writer.writerow([*(row[name] for name in plain), *corners, row["detail"]])
    return stream.getvalue().encode()


# Page


@dataclass(frozen=True)
class Crop:
    """Part of an image around a suspect, in image pixels."""

    source: str  # data URI
    view: Corners  # left, top, width, height


def report_page(report: LabelReport, shards: ShardSet) -> str:
    """Render one self-contained page; the surest suspects have crops."""
    shown = report.suspects[:SHOWN_CROPS]
    crops = _crops(shards, shown)
    counts = Counter(suspect.kind for suspect in report.suspects)
    return html_pages.render(
        "pipeline.labelling",
        "suspects.html.j2",
        report=report,
        lines=report.lines(),
        kinds=[(kind, MEANINGS[kind], counts[kind]) for kind in KINDS if counts[kind]],
        cards=[(suspect, crops.get(index)) for index, suspect in enumerate(shown)],
        rest=len(report.suspects) - len(shown),
    )


def _crops(shards: ShardSet, suspects: Sequence[Suspect]) -> dict[int, Crop]:
    """Crop of every suspect by its index; an image is decoded once."""
    of_image: dict[int, list[int]] = {}
    for index, suspect in enumerate(suspects):
        of_image.setdefault(suspect.number, []).append(index)
    crops: dict[int, Crop] = {}
    for number, row in _rows(shards, sorted(of_image)):
        try:
            pixels = decode_rgb(row["image"], row["width"], row["height"])
        except UndecodableImageError:
            continue  # its cards show boxes alone
        for index in of_image[number]:
            crops[index] = _crop(pixels, suspects[index])
    return crops


def _rows(shards: ShardSet, numbers: Iterable[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of images by their ascending numbers in the order of the shards; one row group is in memory at a time."""
    source = locate_row_groups(shards)
    first = np.cumsum(source.rows) - source.rows
    last, table = -1, None
    for number in numbers:
        group = int(np.searchsorted(first, number, side="right")) - 1
        if group != last or table is None:
            last, table = group, read_row_groups(source, [group], IMAGE_COLUMNS)[group]
        (row,) = table.slice(number - int(first[group]), 1).to_pylist()
        yield number, row


def _crop(pixels: NDArray[np.uint8], suspect: Suspect) -> Crop:
    height, width, _ = pixels.shape
    corners = np.array([box for box in (suspect.annotated, suspect.suggested) if box is not None])
    low, high = corners[:, :2].min(0), corners[:, 2:].max(0)
    margin = max(LEAST_CONTEXT_PX, CONTEXT * float((high - low).max()))
    left, top = (int(value) for value in (low - margin).clip(0, [width - 1, height - 1]))
    right, bottom = (int(value) for value in np.ceil(high + margin).clip(1, [width, height]))
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    part = pixels[top:bottom, left:right]
    scale = min(3.0, CROP_SIDE / max(part.shape[:2]))
    size = max(1, round(part.shape[1] * scale)), max(1, round(part.shape[0] * scale))
    small = np.ascontiguousarray(
        cv2.resize(part, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    )
    encoded = base64.b64encode(simplejpeg.encode_jpeg(small, quality=CROP_QUALITY)).decode()
    return Crop(f"data:image/jpeg;base64,{encoded}", (left, top, right - left, bottom - top))

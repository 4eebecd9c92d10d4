"""COCO results as JSON, from the parts of a prediction: one file where they are few, else numbered files.

detections.json               all detections, at most DETECTIONS_PER_FILE
detections/000000.json        or that many in each file, an image never in two
images.json                   images, and categories with their thresholds, for pycocotools' `COCO(...)`
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.data.shards.manifest import Category
from pipeline.predict.plan import PredictPlan
from pipeline.predict.predicted_images import counts_per_image, record_batches

SMALL_RESULT = 1_000_000  # detections; up to here detections.json is written without being asked for
DETECTIONS_PER_FILE = 1_000_000  # 0.1 GB
DETECTIONS_FILE, DETECTIONS_FOLDER, IMAGES_FILE = "detections.json", "detections", "images.json"
DETECTION_COLUMNS = ("image_id", "boxes", "labels", "scores", "edge_std_px", "edge_intervals")
IMAGE_COLUMNS = ("image_id", "file_name", "frame", "seconds", "width", "height", "rejected")


def write_json(out: str, plan: PredictPlan, num_detections: int) -> int:
    """Write all detections and images as JSON, and return the number of files with detections.

    Args:
        num_detections: in all parts.
    """
    write_images(out, plan)
    batches = record_batches(out, plan, DETECTION_COLUMNS)
    if num_detections <= DETECTIONS_PER_FILE:
        _write_detections(storage.join(out, DETECTIONS_FILE), batches, plan.categories)
        return 1
    number = 0
    for number, group in enumerate(grouped(batches, DETECTIONS_PER_FILE), start=1):
        _write_detections(storage.join(out, DETECTIONS_FOLDER, f"{number - 1:06d}.json"), group, plan.categories)
    return number


def grouped(batches: Iterable[pa.RecordBatch], limit: int) -> Iterator[list[pa.RecordBatch]]:
    """Cut the rows into groups of at most `limit` detections; a single image with more is a group of its own."""
    group: list[pa.RecordBatch] = []
    free = limit
    for batch in batches:
        ends = np.cumsum(counts_per_image(batch))
        start = 0
        while start < batch.num_rows:
            before = int(ends[start - 1]) if start else 0
            stop = max(start, int(np.searchsorted(ends, before + free, side="right")))
            if stop == start and free == limit:
                stop += 1
            if stop > start:
                group.append(batch.slice(start, stop - start))
                free -= int(ends[stop - 1]) - before
            if stop < batch.num_rows:
                yield group
                group, free = [], limit
            start = stop
    if group:
        yield group


def json_rows(batch: pa.RecordBatch, categories: Sequence[Category]) -> bytes:
    """COCO results of a batch, without the brackets around them; empty if there are no detections.

    Numbers have the digits that tell a float32 from its neighbours. Arrow formats whole columns, fifteen times as fast as
    `json.dumps` row by row.
    """
    original_ids = np.array([category.original_id for category in categories], np.int64)
    left, top, right, bottom = _flat(batch, "boxes").reshape(-1, 4).T
    fields = (
        ('{"image_id": ', np.repeat(batch.column("image_id").to_numpy(), counts_per_image(batch))),
        (', "category_id": ', original_ids[_flat(batch, "labels")]),
        (', "bbox": [', left),
        (", ", top),
        (", ", right - left),
        (", ", bottom - top),
        ('], "score": ', _flat(batch, "scores")),
        *_edge_fields(batch),
    )
    texts = [piece for label, values in fields for piece in (label, _as_text(values))]
    rows = pc.binary_join_element_wise(*texts, "}", "")  # the last argument stands between the others
    joined = pc.binary_join(pa.ListArray.from_arrays([0, len(rows)], rows), ",\n")
    return bytes(joined[0].as_buffer())


def _as_text(values: Any) -> pa.Array:
    """Values as JSON has them: NaN, the deviation of an edge that is not known, becomes null."""
    return pc.fill_null(pc.cast(pa.array(values, from_pandas=True), pa.string()), "null")


def _edge_fields(batch: pa.RecordBatch) -> Iterator[tuple[str, Any]]:
    """Deviations and intervals of edges, where they were measured, as pieces of `json_rows`."""
    std, intervals = (_flat(batch, name) for name in ("edge_std_px", "edge_intervals"))
    if len(std):
        columns = zip((', "edge_std_px": [', ", ", ", ", ", "), std.reshape(-1, 4).T, strict=True)
        yield from columns
        yield "]", np.full(len(std) // 4, "")
    if len(intervals):
        starts = (', "edge_intervals": [[', ", ", "], [", ", ", "], [", ", ", "], [", ", ")
        yield from zip(starts, intervals.reshape(-1, 8).T, strict=True)
        yield "]]", np.full(len(intervals) // 8, "")


def write_images(out: str, plan: PredictPlan) -> None:
    """Write all images that could be read, and the categories."""
    with storage.open_atomic(storage.join(out, IMAGES_FILE)) as file:
        separator = b'{"images": ['
        for batch in record_batches(out, plan, IMAGE_COLUMNS):
            for row in batch.to_pylist():
                if row["rejected"] is None:
                    fields = {name: value for name, value in row.items() if value is not None}
                    text = json.dumps({"id": fields.pop("image_id"), **fields})
                    file.write(separator + text.encode())
                    separator = b",\n"
        start = b"" if separator == b",\n" else separator
        categories = [
            {"id": category.original_id, "name": category.name, "threshold": least}
            for category, least in zip(plan.categories, plan.thresholds, strict=True)
        ]
        info = {"threshold": plan.threshold_text}
        if plan.calibration is not None:
            info["scores"] = "calibrated"
        if plan.interval_text is not None:
            info["edge_intervals"] = plan.interval_text
        rest = {"annotations": [], "categories": categories, "info": info}
        file.write(start + b"], " + json.dumps(rest)[1:].encode())


def _write_detections(uri: str, batches: Iterable[pa.RecordBatch], categories: Sequence[Category]) -> None:
    with storage.open_atomic(uri) as file:
        separator = b"["
        for batch in batches:
            if rows := json_rows(batch, categories):
                file.write(separator)
                file.write(rows)
                separator = b",\n"
        file.write(b"]" if separator == b",\n" else b"[]")


def _flat(batch: pa.RecordBatch, name: str) -> Any:
    return batch.column(name).flatten().to_numpy(zero_copy_only=False)

"""The part of an evaluation that goes image by image: each worker writes the detections in its images, and their errors."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.evaluation.analysis import confusion_matrix
from pipeline.evaluation.detections import DetectionTable, concatenate
from pipeline.evaluation.error_types import ERROR_ROW, find_errors, sorted_boxes
from pipeline.evaluation.exchange import ClassFile, ClassWriter, Rows, await_files, read_arrays, write_arrays
from pipeline.evaluation.ground_truth import GroundTruth

CHUNK_DETECTIONS = 1_000_000  # in memory at once
DETECTION_ROW = np.dtype([("image_id", "<i8"), ("score", "<f4"), ("box", "<f4", (4,))])


@dataclass(frozen=True)
class ImageResults:
    """Results in the images of one worker, or of all."""

    detections: NDArray[np.int64]  # [chunks, K] number of detections
    error_rows: NDArray[np.int64]  # [chunks, K] number of rows for `class_gains`
    false_positives: NDArray[np.int64]  # [5] by kind
    accounted: NDArray[np.int64]  # [K] true boxes that are found, or that an error accounts for
    confusion: NDArray[np.int64]  # [K + 1, K + 1] see `Confusion`; images without detections are missing
    layers: NDArray[np.float64]  # see `LayerDiagnostics.state`


@dataclass(frozen=True)
class ImageShards:
    """Detections and errors in all images, as files that are read class by class."""

    results: ImageResults
    detections: tuple[ClassFile, ...]  # rows of `DETECTION_ROW`
    errors: tuple[ClassFile, ...]  # rows of `ERROR_ROW`


def write_image_shard(
    folder: str,
    rank: int,
    ground_truth: GroundTruth,
    tables: Iterable[DetectionTable],
    layers: Callable[[], NDArray[np.float64]],
) -> float:
    """Write the detections in this worker's images, and their errors; return the seconds spent on errors.

    Args:
        tables: each with all detections of its images.
        layers: state of the layer diagnostics, once `tables` has ended.
    """
    number, boxes = len(ground_truth.categories), sorted_boxes(ground_truth)
    false_positives, accounted = np.zeros(5, np.int64), np.zeros(number, np.int64)
    confused = np.zeros((number + 1, number + 1), np.int64)
    seconds = 0.0
    with (
        storage.open_atomic(_path(folder, "detections", rank), durable=False) as detection_stream,
        storage.open_atomic(_path(folder, "errors", rank), durable=False) as error_stream,
    ):
        detections, error_rows = ClassWriter(detection_stream, number), ClassWriter(error_stream, number)
        for table in _chunks(tables):
            started_at = time.perf_counter()
            image = ground_truth.indices_of(table.image_id)
            errors = find_errors(boxes, image, table, number)
            false_positives += errors.count
            accounted += errors.accounted
            confused += confusion_matrix(ground_truth.of_images(np.unique(table.image_id)), table)
            seconds += time.perf_counter() - started_at
            detections.write(table.label, _rows(table))
            error_rows.write(errors.label, errors.rows)
    # The results come last: whoever sees them can read the two files.
    results = ImageResults(detections.counts, error_rows.counts, false_positives, accounted, confused, layers())
    write_arrays(folder, _results(rank), **vars(results))
    return seconds


def await_image_shards(folder: str, world_size: int) -> ImageShards:
    """Wait for the shards of all workers."""
    await_files(folder, [_results(rank) for rank in range(world_size)])
    workers = [ImageResults(**read_arrays(folder, _results(rank))) for rank in range(world_size)]
    return ImageShards(
        results=_joined(workers),
        detections=tuple(
            ClassFile(_path(folder, "detections", rank), DETECTION_ROW, worker.detections)
            for rank, worker in enumerate(workers)
        ),
        errors=tuple(
            ClassFile(_path(folder, "errors", rank), ERROR_ROW, worker.error_rows)
            for rank, worker in enumerate(workers)
        ),
    )


def table_of(label: NDArray[np.int32], rows: Rows) -> DetectionTable:
    """Detections from rows of `DETECTION_ROW`."""
    return DetectionTable(label=label, **{name: np.ascontiguousarray(rows[name]) for name in DETECTION_ROW.names or ()})


def _chunks(tables: Iterable[DetectionTable]) -> Iterator[DetectionTable]:
    """Concatenate tables until they have `CHUNK_DETECTIONS`."""
    waiting: list[DetectionTable] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) >= CHUNK_DETECTIONS:
            yield concatenate(waiting)
            waiting = []
    if waiting:
        yield concatenate(waiting)


def _rows(table: DetectionTable) -> Rows:
    rows = np.empty(len(table), DETECTION_ROW)
    for name in DETECTION_ROW.names or ():
        rows[name] = getattr(table, name)
    return rows


def _joined(workers: list[ImageResults]) -> ImageResults:
    chunked = ("detections", "error_rows")
    joined = {
        field.name: (np.concatenate if field.name in chunked else sum)(
            [getattr(worker, field.name) for worker in workers]
        )
        for field in fields(ImageResults)
    }
    return replace(workers[0], **joined)


def _path(folder: str, name: str, rank: int) -> str:
    return storage.join(folder, f"{name}-{rank:05d}.bin")


def _results(rank: int) -> str:
    return f"images-{rank:05d}.npz"

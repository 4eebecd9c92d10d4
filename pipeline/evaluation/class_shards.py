"""The part of an evaluation that goes class by class: COCO's metrics and the gains of corrected errors.

The classes are dealt out to the workers in ranges, small enough that their detections fit into memory. pycocotools takes about
33 us and 3 kB for a detection, and 22 us for every class of every image. It has the last word up to `EXACT_WORK`; of a larger
set it sees sampled images.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.coco_metrics import ClassMetrics, class_metrics, merged
from pipeline.evaluation.error_types import class_gains
from pipeline.evaluation.exchange import await_files, read_arrays, read_classes, write_arrays
from pipeline.evaluation.ground_truth import GroundTruth
from pipeline.evaluation.image_shards import ImageShards, table_of
from pipeline.evaluation.operating_points import class_points

SHARD_DETECTIONS = 3_000_000  # in memory at once: about 1 GiB with hotcoco's copies; a class is never divided
EXACT_WORK = 4_000_000  # detections plus images x classes; 1.9 million in COCO val2017 with 300 detections an image
EXACT_SHARD_DETECTIONS = 400_000  # in memory at once where pycocotools sees all: about 1.3 GiB
SAMPLE_IMAGES, SAMPLE_SEED = 500, 0


@dataclass(frozen=True)
class ClassResults:
    """Metrics of a range of classes, or of all."""

    fast: ClassMetrics  # by hotcoco
    gains: NDArray[np.float64]  # [6, k] AP50, see `class_gains`
    points: NDArray[np.float64]  # [2, 3, k] see `class_points`
    # If pycocotools is asked: the metrics of both programs in the images that it sees.
    compared: tuple[ClassMetrics, ClassMetrics] | None


def class_ranges(detections: NDArray[np.int64], limit: int, workers: int, *, overhead: int = 1) -> list[range]:
    """Cut the classes into ranges of about equal work, as many for each worker.

    Args:
        detections: [K] number by class.
        limit: most detections in a range of several classes.
        overhead: work for a class without detections, in detections.
    """
    rounds = -(-int(detections.sum()) // (limit * workers))
    number = min(len(detections), max(rounds, 1) * workers)
    work = (detections + overhead).astype(np.float64)
    middle = work.cumsum() - work / 2
    shard = (middle * number / work.sum()).astype(np.int64)  # [K] ascending
    starts = [*np.flatnonzero(np.diff(shard, prepend=-1)).tolist(), len(detections)]
    return [range(start, stop) for start, stop in pairwise(starts)]


def exact_images(ground_truth: GroundTruth, detections: int) -> GroundTruth:
    """Ground truth of the images that pycocotools evaluates: all, or a sample that is the same at every call.

    Args:
        detections: their number in all images.
    """
    if detections + len(ground_truth.image_id) * len(ground_truth.categories) <= EXACT_WORK:
        return ground_truth
    ids = ground_truth.ordered_ids
    chosen = np.random.default_rng(SAMPLE_SEED).choice(len(ids), min(SAMPLE_IMAGES, len(ids)), replace=False)
    return ground_truth.of_images(ids[chosen])


def evaluate_classes(
    shards: ImageShards,
    ground_truth: GroundTruth,
    classes: range,
    exact: GroundTruth | None,
    seconds: dict[str, float],
    wanted_precision: float,
) -> ClassResults:
    """Evaluate a range of classes in all images.

    Args:
        exact: images for pycocotools: `ground_truth` itself, a part of it, or None.
        seconds: the time by part is added here.
        wanted_precision: see `class_points`.
    """
    # 1. hotcoco on all images.
    with _timed(seconds, "evaluator"):
        table = table_of(*read_classes(shards.detections, classes))
        fast = class_metrics(ground_truth, table, classes)

    # 2. Both programs on the images for pycocotools.
    compared = None
    if exact is not None:
        with _timed(seconds, "pycocotools"):
            same = fast
            if exact is not ground_truth:
                table = table[np.isin(table.image_id, exact.image_id)]
                same = class_metrics(exact, table, classes)
            compared = same, class_metrics(exact, table, classes, evaluator="pycocotools")
    del table

    # 3. Gains of corrected errors, and thresholds.
    with _timed(seconds, "analysis"):
        counted = ground_truth.counted_boxes_of_class
        missed = counted - shards.results.accounted
        label, rows = read_classes(shards.errors, classes)
        gains = class_gains(label, rows, counted, missed, classes)
        points = class_points(label, rows, counted, classes, wanted_precision)
    return ClassResults(fast, gains, points, compared)


def share_classes(folder: str, classes: range, results: ClassResults) -> None:
    """Write the metrics of a range for rank 0."""
    parts = {"fast": results.fast}
    if results.compared is not None:
        parts["same"], parts["exact"] = results.compared
    arrays = {f"{name}-{field}": value for name, part in parts.items() for field, value in vars(part).items()}
    write_arrays(folder, _name(classes), gains=results.gains, points=results.points, **arrays)


def await_classes(folder: str, ranges: Sequence[range], own: Mapping[range, ClassResults]) -> ClassResults:
    """Join the metrics of all classes, once the other workers have written theirs.

    Args:
        ranges: of all workers.
        own: results that need no file.
    """
    await_files(folder, [_name(classes) for classes in ranges if classes not in own])
    parts = [own[classes] if classes in own else _read(folder, classes) for classes in ranges]
    compared = [part.compared for part in parts if part.compared is not None]
    return ClassResults(
        fast=merged([part.fast for part in parts]),
        gains=np.concatenate([part.gains for part in parts], axis=1),
        points=np.concatenate([part.points for part in parts], axis=2),
        compared=(merged([same for same, _ in compared]), merged([exact for _, exact in compared]))
        if compared
        else None,
    )


def _read(folder: str, classes: range) -> ClassResults:
    arrays = read_arrays(folder, _name(classes))
    fields = ClassMetrics.__dataclass_fields__
    found = {
        name: ClassMetrics(**{field: arrays[f"{name}-{field}"] for field in fields})
        for name in ("fast", "same", "exact")
        if f"{name}-recall" in arrays
    }
    compared = (found["same"], found["exact"]) if "exact" in found else None
    return ClassResults(found["fast"], arrays["gains"], arrays["points"], compared)


def _name(classes: range) -> str:
    return f"classes-{classes.start:05d}-{classes.stop:05d}.npz"


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    started_at = time.perf_counter()
    yield
    seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - started_at

"""COCO metrics: twelve numbers, AP per class, precision over recall.

Two programs compute them from the same arrays. hotcoco is fast enough for every evaluation of a run. Published numbers come
from pycocotools, so it computes the final numbers of a run.

Both identify a category by its label, and an image by its index in the sorted image ids. The ids of a data set may be any 64-bit
numbers, more than the programs accept; they are needed in result files only.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import hotcoco
import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.evaluation.ground_truth import GroundTruth

if TYPE_CHECKING:  # modules that need the names of the numbers alone import no PyTorch
    from pipeline.evaluation.detections import DetectionTable

Evaluator = Literal["hotcoco", "pycocotools"]

NUMBERS = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
)
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
ALL, SIZES = 0, slice(1, 4)  # indices of the areas in both programs' arrays
MOST = 2  # index of 100 detections per image and class
EQUAL = 1e-6  # largest difference at which the two programs agree


@dataclass(frozen=True)
class ClassResult:
    """AP of one class."""

    name: str
    original_id: int
    boxes: int  # true boxes, without crowd regions
    ap: float  # NaN without true boxes
    ap50: float


@dataclass(frozen=True)
class CocoResult:
    """COCO metrics of one evaluation."""

    evaluator: Evaluator
    numbers: dict[str, float]  # by `NUMBERS`; NaN without true boxes
    per_class: tuple[ClassResult, ...]  # by label
    precision: NDArray[np.float64]  # [10, 101, K] at `IOU_THRESHOLDS` and `RECALLS`; NaN for classes without true boxes


@dataclass(frozen=True)
class ClassMetrics:
    """Metrics of k classes, which depend on no other class. NaN where there are no true boxes."""

    precision: NDArray[np.float64]  # [10, 101, k] at `IOU_THRESHOLDS` and `RECALLS`, all areas, 100 detections
    ap_of_size: NDArray[np.float64]  # [k, 3] small, medium, large
    recall: NDArray[np.float64]  # [k, 3] with 1, 10, 100 detections per image
    recall_of_size: NDArray[np.float64]  # [k, 3] with 100 detections


def coco_numbers(ground_truth: GroundTruth, table: "DetectionTable", *, evaluator: Evaluator = "hotcoco") -> CocoResult:
    """Compute the metrics, from at most the 100 best detections of every image and class; areas are the annotated ones."""
    return result_of(class_metrics(ground_truth, table, evaluator=evaluator), ground_truth, evaluator)


def class_metrics(
    ground_truth: GroundTruth,
    table: "DetectionTable",
    classes: range | None = None,
    *,
    evaluator: Evaluator = "hotcoco",
) -> ClassMetrics:
    """Compute the metrics of some classes.

    Args:
        table: detections of these classes alone.
        classes: their labels; None for all.
    """
    classes = classes if classes is not None else range(len(ground_truth.categories))
    own = ground_truth.of_classes(classes.start, classes.stop)
    run = (run_hotcoco if evaluator == "hotcoco" else run_pycocotools)(own, table, classes)
    arrays = run.eval  # hotcoco copies all of them at every access
    assert arrays is not None
    precision, recall = arrays["precision"][..., MOST], arrays["recall"].mean(0)  # [10, 101, k, 4] and [k, 4, 3]
    return ClassMetrics(
        precision=_nan_where_undefined(precision[..., ALL]),
        ap_of_size=_nan_where_undefined(precision[..., SIZES].mean((0, 1))),
        recall=_nan_where_undefined(recall[:, ALL]),
        recall_of_size=_nan_where_undefined(recall[:, SIZES, MOST]),
    )


def merged(parts: Sequence[ClassMetrics]) -> ClassMetrics:
    """Metrics of all classes from those of their parts, in the order of the labels."""
    return ClassMetrics(
        precision=np.concatenate([part.precision for part in parts], axis=2),
        ap_of_size=np.concatenate([part.ap_of_size for part in parts]),
        recall=np.concatenate([part.recall for part in parts]),
        recall_of_size=np.concatenate([part.recall_of_size for part in parts]),
    )


def result_of(metrics: ClassMetrics, ground_truth: GroundTruth, evaluator: Evaluator) -> CocoResult:
    """Average the metrics over the classes with true boxes."""
    precision = metrics.precision
    averaged = (
        *(precision, precision[0], precision[5], *metrics.ap_of_size.T),
        *(*metrics.recall.T, *metrics.recall_of_size.T),
    )
    ap, ap50 = precision.mean((0, 1)), precision[0].mean(0)  # [K]; a class is NaN everywhere or nowhere
    return CocoResult(
        evaluator=evaluator,
        numbers={name: _mean_where_defined(values) for name, values in zip(NUMBERS, averaged, strict=True)},
        per_class=tuple(
            ClassResult(category.name, category.original_id, int(boxes), float(ap[label]), float(ap50[label]))
            for label, (category, boxes) in enumerate(
                zip(ground_truth.categories, ground_truth.boxes_of_class, strict=True)
            )
        ),
        precision=precision,
    )


def _nan_where_undefined(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Replace -1, which both programs write where there are no true boxes."""
    return np.where(values < 0, np.nan, values)


def _mean_where_defined(values: NDArray[np.float64]) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def agreement(ground_truth: GroundTruth, table: "DetectionTable") -> float:
    """Largest difference between the results of the two programs."""
    return difference(*(coco_numbers(ground_truth, table, evaluator=name) for name in ("hotcoco", "pycocotools")))


def difference(one: CocoResult, other: CocoResult) -> float:
    """Largest difference in numbers and in AP per class; infinite if only one of them is NaN somewhere."""
    a, b = (np.array([*r.numbers.values(), *(c.ap for c in r.per_class)]) for r in (one, other))
    if (np.isnan(a) != np.isnan(b)).any():
        return float("inf")
    return float(np.nanmax(np.abs(a - b), initial=0.0))


def run_hotcoco(ground_truth: GroundTruth, table: "DetectionTable", classes: range) -> hotcoco.COCOeval:
    """Run hotcoco on the boxes and detections of some classes."""
    run = prepared_hotcoco(ground_truth, table, classes)
    run.evaluate()
    run.accumulate()
    return run


def prepared_hotcoco(ground_truth: GroundTruth, table: "DetectionTable", classes: range) -> hotcoco.COCOeval:
    """Load ground truth and detections into hotcoco."""
    coco_truth = hotcoco.COCO.from_arrays(
        images=_images(ground_truth),
        categories=_categories(ground_truth, classes),
        image_ids=ground_truth.indices_of(ground_truth.image_id[ground_truth.image]),
        category_ids=ground_truth.label.astype(np.int64),
        boxes=xywh(ground_truth.box),
        area=ground_truth.area.astype(np.float64),
        iscrowd=ground_truth.crowd,
    )
    rows = np.empty((len(table), 7))
    rows[:, 0] = ground_truth.indices_of(table.image_id)
    rows[:, 1:5] = table.box
    rows[:, 3:5] -= rows[:, 1:3]
    rows[:, 5] = table.score
    rows[:, 6] = table.label
    return hotcoco.COCOeval(coco_truth, coco_truth.load_res(rows), "bbox")


def run_pycocotools(ground_truth: GroundTruth, table: "DetectionTable", classes: range) -> COCOeval:
    """Run pycocotools on some classes. It needs a dictionary per detection: 3 kB, and 0.1 ms or more."""
    # 1. Columns to rows.
    boxes, detected = xywh(ground_truth.box), xywh(table.box)
    annotations = zip(
        ground_truth.indices_of(ground_truth.image_id[ground_truth.image]).tolist(),
        ground_truth.label.tolist(),
        boxes.tolist(),
        ground_truth.area.tolist(),
        ground_truth.crowd.tolist(),
        strict=True,
    )
    detections = zip(
        ground_truth.indices_of(table.image_id).tolist(),
        table.label.tolist(),
        detected.tolist(),
        (detected[:, 2] * detected[:, 3]).tolist(),
        table.score.tolist(),
        strict=True,
    )

    # 2. Rows to the dictionaries of pycocotools, which reports every stage on stdout.
    fields = ("image_id", "category_id", "bbox", "area")
    with contextlib.redirect_stdout(io.StringIO()):
        coco_truth = _indexed(
            ground_truth,
            classes,
            [
                dict(zip(fields, row, strict=True), id=number, iscrowd=int(crowd))
                for number, (*row, crowd) in enumerate(annotations, start=1)  # pycocotools takes 0 for "unmatched"
            ],
        )
        coco_detections = _indexed(
            ground_truth,
            classes,
            [
                dict(zip(fields, row, strict=True), id=number, iscrowd=0, score=score)
                for number, (*row, score) in enumerate(detections, start=1)
            ],
        )
        run = COCOeval(coco_truth, coco_detections, "bbox")
        run.evaluate()
        run.accumulate()
    return run


def xywh(box: NDArray[np.float32]) -> NDArray[np.float64]:
    """Convert boxes from xyxy to COCO's left, top, width, height."""
    corners = box.astype(np.float64)
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)


def _images(ground_truth: GroundTruth) -> list[dict[str, Any]]:
    order = np.argsort(ground_truth.image_id)
    sizes = zip(ground_truth.width[order].tolist(), ground_truth.height[order].tolist(), strict=True)
    return [{"id": index, "width": width, "height": height} for index, (width, height) in enumerate(sizes)]


def _categories(ground_truth: GroundTruth, classes: range) -> list[dict[str, Any]]:
    return [{"id": label, "name": ground_truth.categories[label].name} for label in classes]


def _indexed(ground_truth: GroundTruth, classes: range, annotations: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": _images(ground_truth),
        "categories": _categories(ground_truth, classes),
        "annotations": annotations,
    }
    coco.createIndex()
    return coco

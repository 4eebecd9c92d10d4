"""COCO metrics: twelve numbers, AP per class, precision over recall.

Two programs compute them from the same arrays. hotcoco is fast enough for every evaluation of a run. Published numbers come
from pycocotools, so it computes the final numbers of a run.

Both identify a category by its label, and an image by its index in the sorted image ids. The ids of a data set may be any 64-bit
numbers, more than the programs accept; they are needed in result files only.
"""

import contextlib
import io
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
ALL_AREAS, HUNDRED_DETECTIONS = 0, 2  # indices on the last axes of the precision array
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


def coco_numbers(ground_truth: GroundTruth, table: "DetectionTable", *, evaluator: Evaluator = "hotcoco") -> CocoResult:
    """Compute the metrics, from at most the 100 best detections of every image and class; areas are the annotated ones."""
    run = run_hotcoco(ground_truth, table) if evaluator == "hotcoco" else run_pycocotools(ground_truth, table)
    return result_of(run, ground_truth)


def agreement(ground_truth: GroundTruth, table: "DetectionTable") -> float:
    """Largest difference between the results of the two programs."""
    return difference(*(coco_numbers(ground_truth, table, evaluator=name) for name in ("hotcoco", "pycocotools")))


def difference(one: CocoResult, other: CocoResult) -> float:
    """Largest difference in numbers and in AP per class; infinite if only one of them is NaN somewhere."""
    a, b = (np.array([*r.numbers.values(), *(c.ap for c in r.per_class)]) for r in (one, other))
    if (np.isnan(a) != np.isnan(b)).any():
        return float("inf")
    return float(np.nanmax(np.abs(a - b), initial=0.0))


def run_hotcoco(ground_truth: GroundTruth, table: "DetectionTable") -> hotcoco.COCOeval:
    """Run hotcoco; the error analysis builds on its state."""
    run = prepared_hotcoco(ground_truth, table)
    with contextlib.redirect_stdout(io.StringIO()):
        run.run()
    return run


def prepared_hotcoco(ground_truth: GroundTruth, table: "DetectionTable") -> hotcoco.COCOeval:
    """Load ground truth and detections into hotcoco."""
    coco_truth = hotcoco.COCO.from_arrays(
        images=_images(ground_truth),
        categories=_categories(ground_truth),
        image_ids=_image_indices(ground_truth, ground_truth.image_id[ground_truth.image]),
        category_ids=ground_truth.label.astype(np.int64),
        boxes=xywh(ground_truth.box),
        area=ground_truth.area.astype(np.float64),
        iscrowd=ground_truth.crowd,
    )
    indices = _image_indices(ground_truth, table.image_id)
    rows = np.column_stack([indices, xywh(table.box), table.score, table.label]).astype(np.float64)
    return hotcoco.COCOeval(coco_truth, coco_truth.load_res(rows), "bbox")


def run_pycocotools(ground_truth: GroundTruth, table: "DetectionTable") -> COCOeval:
    """Run pycocotools. It needs a dictionary per detection, which takes minutes for a large set."""
    # 1. Columns to rows.
    boxes, detected = xywh(ground_truth.box), xywh(table.box)
    annotations = zip(
        _image_indices(ground_truth, ground_truth.image_id[ground_truth.image]).tolist(),
        ground_truth.label.tolist(),
        boxes.tolist(),
        ground_truth.area.tolist(),
        ground_truth.crowd.tolist(),
        strict=True,
    )
    detections = zip(
        _image_indices(ground_truth, table.image_id).tolist(),
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
            [
                dict(zip(fields, row, strict=True), id=number, iscrowd=int(crowd))
                for number, (*row, crowd) in enumerate(annotations, start=1)  # pycocotools takes 0 for "unmatched"
            ],
        )
        coco_detections = _indexed(
            ground_truth,
            [
                dict(zip(fields, row, strict=True), id=number, iscrowd=0, score=score)
                for number, (*row, score) in enumerate(detections, start=1)
            ],
        )
        run = COCOeval(coco_truth, coco_detections, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def result_of(run: "hotcoco.COCOeval | COCOeval", ground_truth: GroundTruth) -> CocoResult:
    """Convert the state of either program after its run."""
    assert run.eval is not None
    precision = _nan_where_undefined(run.eval["precision"][..., ALL_AREAS, HUNDRED_DETECTIONS])
    ap, ap50 = precision.mean((0, 1)), precision[0].mean(0)  # [K]; a class is NaN everywhere or nowhere
    return CocoResult(
        evaluator="hotcoco" if isinstance(run, hotcoco.COCOeval) else "pycocotools",
        numbers=dict(zip(NUMBERS, _nan_where_undefined(run.stats).tolist(), strict=True)),
        per_class=tuple(
            ClassResult(category.name, category.original_id, int(boxes), float(ap[label]), float(ap50[label]))
            for label, (category, boxes) in enumerate(
                zip(ground_truth.categories, ground_truth.boxes_of_class, strict=True)
            )
        ),
        precision=precision,
    )


def _nan_where_undefined(values: Any) -> NDArray[np.float64]:
    """Replace -1, which both programs write where there are no true boxes."""
    array = np.asarray(values, np.float64)
    return np.where(array < 0, np.nan, array)


def xywh(box: NDArray[np.float32]) -> NDArray[np.float64]:
    """Convert boxes from xyxy to COCO's left, top, width, height."""
    corners = box.astype(np.float64)
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)


def _image_indices(ground_truth: GroundTruth, image_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of image ids in the sorted ids of all images; their order decides between detections of equal scores."""
    ordered = np.sort(ground_truth.image_id)
    indices = np.searchsorted(ordered, image_ids)
    known = np.isin(image_ids, ordered)
    if not known.all():
        raise ValueError(
            f"image {image_ids[~known][0]} is not among the images of the ground truth: does it belong to another shard set?"
        )
    return indices


def _images(ground_truth: GroundTruth) -> list[dict[str, Any]]:
    order = np.argsort(ground_truth.image_id)
    sizes = zip(ground_truth.width[order].tolist(), ground_truth.height[order].tolist(), strict=True)
    return [{"id": index, "width": width, "height": height} for index, (width, height) in enumerate(sizes)]


def _categories(ground_truth: GroundTruth) -> list[dict[str, Any]]:
    return [{"id": category.label, "name": category.name} for category in ground_truth.categories]


def _indexed(ground_truth: GroundTruth, annotations: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": _images(ground_truth),
        "categories": _categories(ground_truth),
        "annotations": annotations,
    }
    coco.createIndex()
    return coco

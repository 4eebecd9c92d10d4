"""The COCO protocol: twelve numbers, AP per class, precision over recall.

Two programs compute it from the same arrays. hotcoco is fast enough for every evaluation of a run; pycocotools is the one
that published numbers come from, so it has the last word at the end of a run.

Both know a category by its label and an image by its place among the image ids: ids of the source can be anything that fits
into 64 bits, which is more than they take, and matter only in result files.
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

if TYPE_CHECKING:  # what needs the numbers' names alone does without PyTorch
    from pipeline.evaluation.detections import DetectionTable

Evaluator = Literal["hotcoco", "pycocotools"]

NUMBERS = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
)
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
ALL_AREAS, HUNDRED_DETECTIONS = 0, 2  # places on the axes of the protocol's arrays
EQUAL = 1e-6  # largest difference at which the two programs agree


@dataclass(frozen=True)
class ClassResult:
    name: str
    original_id: int
    boxes: int  # to be found; crowd regions are none
    ap: float  # NaN if there are none
    ap50: float


@dataclass(frozen=True)
class CocoResult:
    evaluator: Evaluator
    numbers: dict[str, float]  # by `NUMBERS`; NaN where there is no truth to be found
    per_class: tuple[ClassResult, ...]  # by label
    precision: NDArray[np.float64]  # [10, 101, K] at `IOU_THRESHOLDS` and `RECALLS`; NaN for classes without truth


def coco_numbers(truth: GroundTruth, table: "DetectionTable", *, evaluator: Evaluator = "hotcoco") -> CocoResult:
    """Score the detections, at most the 100 best of every image and class; areas are those that were annotated."""
    run = run_hotcoco(truth, table) if evaluator == "hotcoco" else run_pycocotools(truth, table)
    return result_of(run, truth)


def agreement(truth: GroundTruth, table: "DetectionTable") -> float:
    """Largest difference between what the two programs say."""
    return difference(*(coco_numbers(truth, table, evaluator=name) for name in ("hotcoco", "pycocotools")))


def difference(one: CocoResult, other: CocoResult) -> float:
    """Largest difference in numbers and in AP per class; infinite if only one of them is NaN somewhere."""
    a, b = (np.array([*r.numbers.values(), *(c.ap for c in r.per_class)]) for r in (one, other))
    if (np.isnan(a) != np.isnan(b)).any():
        return float("inf")
    return float(np.nanmax(np.abs(a - b), initial=0.0))


def run_hotcoco(truth: GroundTruth, table: "DetectionTable") -> hotcoco.COCOeval:
    """The evaluator after its work; error analysis builds on it."""
    run = prepared_hotcoco(truth, table)
    with contextlib.redirect_stdout(io.StringIO()):
        run.run()
    return run


def prepared_hotcoco(truth: GroundTruth, table: "DetectionTable") -> hotcoco.COCOeval:
    coco_truth = hotcoco.COCO.from_arrays(
        images=_images(truth),
        categories=_categories(truth),
        image_ids=_places(truth, truth.image_id[truth.image]),
        category_ids=truth.label.astype(np.int64),
        boxes=xywh(truth.box),
        area=truth.area.astype(np.float64),
        iscrowd=truth.crowd,
    )
    places = _places(truth, table.image_id)
    rows = np.column_stack([places, xywh(table.box), table.score, table.label]).astype(np.float64)
    return hotcoco.COCOeval(coco_truth, coco_truth.load_res(rows), "bbox")


def run_pycocotools(truth: GroundTruth, table: "DetectionTable") -> COCOeval:
    """The evaluator after its work. It needs a dictionary for every detection: minutes for a large set."""
    boxes, found = xywh(truth.box), xywh(table.box)
    annotations = zip(
        _places(truth, truth.image_id[truth.image]).tolist(),
        truth.label.tolist(),
        boxes.tolist(),
        truth.area.tolist(),
        truth.crowd.tolist(),
        strict=True,
    )
    detections = zip(
        _places(truth, table.image_id).tolist(),
        table.label.tolist(),
        found.tolist(),
        (found[:, 2] * found[:, 3]).tolist(),
        table.score.tolist(),
        strict=True,
    )
    fields = ("image_id", "category_id", "bbox", "area")
    with contextlib.redirect_stdout(io.StringIO()):  # it reports every stage
        coco_truth = _indexed(
            truth,
            [
                dict(zip(fields, row, strict=True), id=number, iscrowd=int(crowd))
                for number, (*row, crowd) in enumerate(annotations, start=1)  # 0 would read as "unmatched"
            ],
        )
        coco_found = _indexed(
            truth,
            [
                dict(zip(fields, row, strict=True), id=number, iscrowd=0, score=score)
                for number, (*row, score) in enumerate(detections, start=1)
            ],
        )
        run = COCOeval(coco_truth, coco_found, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def result_of(run: "hotcoco.COCOeval | COCOeval", truth: GroundTruth) -> CocoResult:
    """What either program found, in our words."""
    assert run.eval is not None
    precision = _nan_where_undefined(run.eval["precision"][..., ALL_AREAS, HUNDRED_DETECTIONS])
    ap, ap50 = precision.mean((0, 1)), precision[0].mean(0)  # [K]; a class is NaN everywhere or nowhere
    return CocoResult(
        evaluator="hotcoco" if isinstance(run, hotcoco.COCOeval) else "pycocotools",
        numbers=dict(zip(NUMBERS, _nan_where_undefined(run.stats).tolist(), strict=True)),
        per_class=tuple(
            ClassResult(category.name, category.original_id, int(boxes), float(ap[label]), float(ap50[label]))
            for label, (category, boxes) in enumerate(zip(truth.categories, truth.boxes_of_class, strict=True))
        ),
        precision=precision,
    )


def _nan_where_undefined(values: Any) -> NDArray[np.float64]:
    """Both programs write -1 where there is no truth."""
    array = np.asarray(values, np.float64)
    return np.where(array < 0, np.nan, array)


def xywh(box: NDArray[np.float32]) -> NDArray[np.float64]:
    corners = box.astype(np.float64)
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)


def _places(truth: GroundTruth, image_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where ids stand in the order of all image ids, which decides between detections of equal scores."""
    ordered = np.sort(truth.image_id)
    places = np.searchsorted(ordered, image_ids)
    known = np.isin(image_ids, ordered)
    if not known.all():
        raise ValueError(
            f"image {image_ids[~known][0]} is not among the images of the truth: is it of another shard set?"
        )
    return places


def _images(truth: GroundTruth) -> list[dict[str, Any]]:
    order = np.argsort(truth.image_id)
    sizes = zip(truth.width[order].tolist(), truth.height[order].tolist(), strict=True)
    return [{"id": place, "width": width, "height": height} for place, (width, height) in enumerate(sizes)]


def _categories(truth: GroundTruth) -> list[dict[str, Any]]:
    return [{"id": category.label, "name": category.name} for category in truth.categories]


def _indexed(truth: GroundTruth, annotations: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    coco.dataset = {"images": _images(truth), "categories": _categories(truth), "annotations": annotations}
    coco.createIndex()
    return coco

"""Error analysis: precision over recall, and confusion of classes, which hotcoco counts."""

from dataclasses import dataclass

import hotcoco
import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.coco_metrics import IOU_THRESHOLDS, RECALLS, CocoResult, prepared_hotcoco, xywh
from pipeline.evaluation.detections import DetectionTable
from pipeline.evaluation.ground_truth import GroundTruth

CONFUSION_SCORE = 0.25  # detections below it would hardly be used
CONFUSION_IOU = 0.5


@dataclass(frozen=True)
class Curves:
    """Precision over recall, as COCO interpolates it; NaN where a class, or every class, has no true boxes."""

    recall: NDArray[np.float64]  # [101]
    iou: NDArray[np.float64]  # [10] thresholds
    mean: NDArray[np.float64]  # [10, 101] over classes with true boxes
    per_class: NDArray[np.float64]  # [K, 101] at IoU 0.5


@dataclass(frozen=True)
class Confusion:
    """Confusion matrix of the detections of at least `score`, matched to true boxes of any class, best score first."""

    matrix: NDArray[np.int64]  # [K + 1, K + 1] true class by detected class; last row and column: background
    score: float
    iou: float


def precision_recall(result: CocoResult) -> Curves:
    """Average the precision curves over classes."""
    known = ~np.isnan(result.precision[0, 0])  # [K]
    shape = result.precision.shape[:2]
    mean = result.precision[..., known].mean(-1) if known.any() else np.full(shape, np.nan)
    return Curves(recall=RECALLS, iou=IOU_THRESHOLDS, mean=mean, per_class=result.precision[0].T)


def confusion(matrix: NDArray[np.int64], ground_truth: GroundTruth) -> Confusion:
    """Complete the sum of the matrices of all images that have detections: the boxes of the others are missed, too."""
    matrix = matrix.copy()
    matrix[:-1, -1] = ground_truth.boxes_of_class - matrix[:-1, :-1].sum(1)
    return Confusion(matrix, CONFUSION_SCORE, CONFUSION_IOU)


def confusion_matrix(ground_truth: GroundTruth, table: DetectionTable) -> NDArray[np.int64]:
    """Count which class is detected as which; those of several sets of images add up."""
    kept = table[table.score >= CONFUSION_SCORE]
    kept = kept[~_in_crowd(ground_truth, kept)]
    run = prepared_hotcoco(ground_truth, kept, range(len(ground_truth.categories)))
    result = run.confusion_matrix(iou_thr=CONFUSION_IOU, max_det=max(1, len(kept)))
    matrix: NDArray[np.int64] = result["matrix"].astype(np.int64)
    return matrix


def _in_crowd(ground_truth: GroundTruth, table: DetectionTable) -> NDArray[np.bool_]:
    """[D] detections that lie in a crowd region of their class and on no other box: neither right nor wrong.

    hotcoco's matrix ignores crowd regions, and would count them as detections of background.
    """
    inside = np.zeros(len(table), np.bool_)
    by_image = np.argsort(table.image_id, kind="stable")
    ordered_ids = table.image_id[by_image]
    for image in np.unique(ground_truth.image[ground_truth.crowd]):
        image_id = ground_truth.image_id[image]
        here = by_image[slice(*np.searchsorted(ordered_ids, [image_id, image_id + 1]))]
        boxes = slice(*np.searchsorted(ground_truth.image, [image, image + 1]))
        crowd = ground_truth.crowd[boxes]
        # [n, m]: IoU; for crowd regions the fraction of the detection inside
        overlaps = hotcoco.primitives.bbox_iou(xywh(table.box[here]), xywh(ground_truth.box[boxes]), crowd)
        hit = overlaps.reshape(len(here), len(crowd)) >= CONFUSION_IOU
        same_class = table.label[here, None] == ground_truth.label[boxes]
        inside[here] = (hit & crowd & same_class).any(1) & ~(hit & ~crowd).any(1)
    return inside

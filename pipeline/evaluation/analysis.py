"""Error analysis: precision over recall, confusion of classes, and TIDE's split of the lost AP.

TIDE and the confusion matrix are hotcoco's. On random scenes its TIDE gives the same counts and differences as the authors' own
program; it averages over the classes that have boxes to find, as COCO does.
"""

from dataclasses import dataclass

import hotcoco
import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.coco_metrics import IOU_THRESHOLDS, RECALLS, CocoResult, prepared_hotcoco, xywh
from pipeline.evaluation.detections import DetectionTable
from pipeline.evaluation.ground_truth import GroundTruth

CONFUSION_SCORE = 0.25  # detections below it would hardly be used
CONFUSION_IOU = 0.5
TIDE_NAMES = {
    "classification": "Cls",
    "localisation": "Loc",
    "both": "Both",
    "duplicate": "Dupe",
    "background": "Bkg",
    "missed": "Miss",
}


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


@dataclass(frozen=True)
class Errors:
    """TIDE at IoU 0.5 (0.1 for background): number of each error, and the AP50 gained if it alone were corrected.

    A false positive is one of five: *classification* — it covers a box of another class; *localisation* — it overlaps a box of
    its class, but below 0.5; *both*; *duplicate* — a better detection has the box; *background* — there is no object. *missed* is
    a true box that no false positive of the first two kinds accounts for.

    Source: Bolya et al., arXiv:2008.08115.
    """

    gain: dict[str, float]  # AP50 gained, in [0, 1]; by `TIDE_NAMES`
    count: dict[str, int]


def precision_recall(result: CocoResult) -> Curves:
    """Average the precision curves over classes."""
    known = ~np.isnan(result.precision[0, 0])  # [K]
    shape = result.precision.shape[:2]
    mean = result.precision[..., known].mean(-1) if known.any() else np.full(shape, np.nan)
    return Curves(recall=RECALLS, iou=IOU_THRESHOLDS, mean=mean, per_class=result.precision[0].T)


def confusion(ground_truth: GroundTruth, table: DetectionTable, *, score: float = CONFUSION_SCORE) -> Confusion:
    """Count which class is detected as which."""
    kept = table[table.score >= score]
    kept = kept[~_in_crowd(ground_truth, kept)]
    run = prepared_hotcoco(ground_truth, kept)
    result = run.confusion_matrix(iou_thr=CONFUSION_IOU, max_det=max(1, len(kept)))
    return Confusion(result["matrix"].astype(np.int64), score, CONFUSION_IOU)


def tide_errors(run: hotcoco.COCOeval) -> Errors:
    """Split the lost AP50 by kind of error.

    Args:
        run: from `run_hotcoco`.
    """
    result = run.tide_errors(pos_thr=0.5, bg_thr=0.1)
    return Errors(
        gain={name: float(result["delta_ap"][short]) for name, short in TIDE_NAMES.items()},
        count={name: int(result["counts"][short]) for name, short in TIDE_NAMES.items()},
    )


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

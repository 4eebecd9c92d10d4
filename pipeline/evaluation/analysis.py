"""Where the errors are: precision over recall, confusion of classes, and TIDE's split of what is lost.

TIDE and the confusion matrix are hotcoco's, which on random scenes gives the same counts and differences as the authors' own
program; it averages over the classes that have boxes to find, as COCO does.
"""

from dataclasses import dataclass

import hotcoco
import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.coco_metrics import IOU_THRESHOLDS, RECALLS, CocoResult, prepared_hotcoco, xywh
from pipeline.evaluation.detections import DetectionTable
from pipeline.evaluation.ground_truth import GroundTruth

CONFUSION_SCORE = 0.25  # a detection below it would hardly be shown to anyone
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
    """Precision over recall, as COCO interpolates it; NaN where a class, or all of them, have no truth."""

    recall: NDArray[np.float64]  # [101]
    iou: NDArray[np.float64]  # [10] thresholds
    mean: NDArray[np.float64]  # [10, 101] over classes with truth
    per_class: NDArray[np.float64]  # [K, 101] at IoU 0.5


@dataclass(frozen=True)
class Confusion:
    """Detections of at least `score`, matched to true boxes of any class, best score first."""

    matrix: NDArray[np.int64]  # [K + 1, K + 1] true class by detected class; the last of each is background
    score: float
    iou: float


@dataclass(frozen=True)
class Errors:
    """TIDE at IoU 0.5 (0.1 for background): each error's number, and the AP50 gained if it alone were put right.

    Of a false positive: *classification* — another class's box is covered; *localisation* — its own class's box is hit, but
    below 0.5; *both*; *duplicate* — a better detection has the box; *background* — nothing is there. *missed* is a
    true box that no false positive of the first two kinds accounts for.

    Source: Bolya et al., arXiv:2008.08115.
    """

    gain: dict[str, float]  # AP50 gained, in [0, 1]; by `TIDE_NAMES`
    count: dict[str, int]


def precision_recall(result: CocoResult) -> Curves:
    known = ~np.isnan(result.precision[0, 0])  # [K]
    shape = result.precision.shape[:2]
    mean = result.precision[..., known].mean(-1) if known.any() else np.full(shape, np.nan)
    return Curves(recall=RECALLS, iou=IOU_THRESHOLDS, mean=mean, per_class=result.precision[0].T)


def confusion(truth: GroundTruth, table: DetectionTable, *, score: float = CONFUSION_SCORE) -> Confusion:
    kept = table[table.score >= score]
    kept = kept[~_in_crowd(truth, kept)]
    run = prepared_hotcoco(truth, kept)
    found = run.confusion_matrix(iou_thr=CONFUSION_IOU, max_det=max(1, len(kept)))
    return Confusion(found["matrix"].astype(np.int64), score, CONFUSION_IOU)


def tide_errors(run: hotcoco.COCOeval) -> Errors:
    """
    Args:
        run: from `run_hotcoco`.
    """
    found = run.tide_errors(pos_thr=0.5, bg_thr=0.1)
    return Errors(
        gain={name: float(found["delta_ap"][short]) for name, short in TIDE_NAMES.items()},
        count={name: int(found["counts"][short]) for name, short in TIDE_NAMES.items()},
    )


def _in_crowd(truth: GroundTruth, table: DetectionTable) -> NDArray[np.bool_]:
    """[D] detections that lie in a crowd region of their class and on no other box: neither right nor wrong.

    hotcoco's matrix does not know crowd regions and would call them detections of background.
    """
    inside = np.zeros(len(table), np.bool_)
    by_image = np.argsort(table.image_id, kind="stable")
    ordered_ids = table.image_id[by_image]
    for image in np.unique(truth.image[truth.crowd]):
        image_id = truth.image_id[image]
        here = by_image[slice(*np.searchsorted(ordered_ids, [image_id, image_id + 1]))]
        boxes = slice(*np.searchsorted(truth.image, [image, image + 1]))
        crowd = truth.crowd[boxes]
        # [n, m]: IoU, for crowd regions the share of the detection that lies in them
        overlaps = hotcoco.primitives.bbox_iou(xywh(table.box[here]), xywh(truth.box[boxes]), crowd)
        hit = overlaps.reshape(len(here), len(crowd)) >= CONFUSION_IOU
        same_class = table.label[here, None] == truth.label[boxes]
        inside[here] = (hit & crowd & same_class).any(1) & ~(hit & ~crowd).any(1)
    return inside

"""Operating points of every class: the scores that give the best F1, and a wanted precision.

Detections are matched at IoU 0.5 as COCO does it, best score first; see `error_types`. A class without true boxes has no points.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dfine_core.thresholds import ClassThresholds
from pipeline.evaluation.error_types import RELABELLED, RIGHT
from pipeline.evaluation.exchange import Rows

POINT_FIELDS = ("score", "precision", "recall")


@dataclass(frozen=True)
class OperatingPoint:
    """Precision and recall of the detections of one class from a score on."""

    score: float
    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


@dataclass(frozen=True)
class OperatingPoints:
    """Points of all classes, by label; None where no score gives what is wanted."""

    best_f1: tuple[OperatingPoint | None, ...]  # of equal ones that with the highest score
    at_precision: tuple[OperatingPoint | None, ...]  # lowest score whose precision is at least the wanted one
    wanted_precision: float

    @property
    def thresholds(self) -> ClassThresholds:
        """Scores alone, as they travel with a detector."""
        best, precise = (
            tuple(None if point is None else point.score for point in points)
            for points in (self.best_f1, self.at_precision)
        )
        return ClassThresholds(best, precise, self.wanted_precision)


def class_points(
    label: NDArray[np.int32], rows: Rows, counted: NDArray[np.int64], classes: range, wanted_precision: float
) -> NDArray[np.float64]:
    """Points of k adjacent classes, [2, 3, k]: best F1 and wanted precision; fields by `POINT_FIELDS`; NaN without a point.

    Args:
        label: [n] classes of the rows, from all images.
        rows: [n] of `ERROR_ROW`.
        counted: [K] number of true boxes.
    """
    detected = rows["kind"] != RELABELLED  # a detection's second row, in the class where it would be right
    label, rows = label[detected], rows[detected]
    by_class = np.argsort(label, kind="stable")
    bounds = np.searchsorted(label[by_class], np.arange(classes.start, classes.stop + 1))
    points = np.full((2, len(POINT_FIELDS), len(classes)), np.nan)
    for index, one in enumerate(classes):
        own = rows[by_class[bounds[index] : bounds[index + 1]]]
        if counted[one] and len(own):
            points[..., index] = points_of_class(
                own["score"], own["kind"] == RIGHT, int(counted[one]), wanted_precision
            )
    return points


def points_of(points: NDArray[np.float64], wanted_precision: float) -> OperatingPoints:
    """Points from the array of `class_points` over all classes."""
    best, precise = (
        tuple(None if np.isnan(column[0]) else OperatingPoint(*map(float, column)) for column in each.T)
        for each in points
    )
    return OperatingPoints(best, precise, wanted_precision)


def points_of_class(
    score: NDArray[np.float32], right: NDArray[np.bool_], boxes: int, wanted_precision: float
) -> NDArray[np.float64]:
    """Points of one class, [2, 3]: best F1 and wanted precision; fields by `POINT_FIELDS`; NaN without a point.

    Args:
        score: [n] of its detections.
        right: [n] whether they found a box.
        boxes: number of its true boxes.
    """
    # Every distinct score as the lowest one that is kept, the highest first.
    order = np.argsort(-score, kind="stable")
    score, right = score[order], right[order]
    last = np.append(score[1:] != score[:-1], True)
    found = right.cumsum()[last]
    kept = np.flatnonzero(last) + 1
    score, precision, recall = score[last].astype(np.float64), found / kept, found / boxes
    f1 = 2 * found / (kept + boxes)

    points = np.full((2, len(POINT_FIELDS)), np.nan)
    best = int(f1.argmax())
    if found[best]:
        points[0] = score[best], precision[best], recall[best]
    reached = np.flatnonzero(precision >= wanted_precision)
    if len(reached):
        lowest = reached[-1]
        points[1] = score[lowest], precision[lowest], recall[lowest]
    return points

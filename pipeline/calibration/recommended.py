"""Thresholds that the calibration images recommend, class by class, as raw and as calibrated scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dfine_core.thresholds import WANTED_PRECISION
from dfine_core.uncertainty import CROWD, ScoreCalibration, TrueBoxes, match_for_calibration
from pipeline.calibration.fit import IOU
from pipeline.calibration.measure import MeasuredDetections
from pipeline.evaluation.operating_points import POINT_FIELDS, points_of_class


@dataclass(frozen=True)
class RecommendedThreshold:
    """Score from which detections of a class are kept."""

    raw: float
    calibrated: float
    precision: float
    recall: float


@dataclass(frozen=True)
class ClassRecommendation:
    """Thresholds of one class; None where no score gives what is wanted."""

    name: str
    boxes: int
    best_f1: RecommendedThreshold | None
    at_precision: RecommendedThreshold | None  # the lowest one that reaches `WANTED_PRECISION`


def recommended(
    measured: MeasuredDetections, truth: TrueBoxes, scores: ScoreCalibration, names: Sequence[str]
) -> list[ClassRecommendation]:
    """Measure the thresholds on all images, as an evaluation does."""
    match = match_for_calibration(measured.found, truth, IOU)
    boxes = torch.bincount(truth.labels[_counted(truth)], minlength=len(names)).tolist()
    rows = []
    for label, name in enumerate(names):
        own = (measured.found.labels == label) & (match != CROWD)
        points = np.full((2, len(POINT_FIELDS)), np.nan)
        if boxes[label] and own.any():
            found = measured.found.scores[own].numpy(), (match[own] >= 0).numpy()
            points = points_of_class(*found, boxes[label], WANTED_PRECISION)
        best, precise = (_threshold(point.tolist(), scores) for point in points)
        rows.append(ClassRecommendation(name, boxes[label], best, precise))
    return rows


def _counted(truth: TrueBoxes) -> Any:
    return torch.ones(len(truth.labels), dtype=torch.bool) if truth.crowd is None else ~truth.crowd


def _threshold(point: list[float], scores: ScoreCalibration) -> RecommendedThreshold | None:
    raw, precision, recall = point
    if np.isnan(raw):
        return None
    return RecommendedThreshold(raw, float(scores(torch.tensor(raw))), precision, recall)

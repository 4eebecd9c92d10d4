"""Calibration fitted on one half of the images, and what it is worth on the other half."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfine_core.boxes import iou as box_iou
from dfine_core.uncertainty import (
    CROWD,
    ScoreCalibration,
    TrueBoxes,
    detection_calibration_error,
    edge_errors,
    fit_edge_calibration,
    fit_score_calibration,
    interval_coverage,
    label_aware_calibration_error,
    match_for_calibration,
    rank_correlation,
    width_calibration_error,
)
from dfine_core.uncertainty.detector_calibration import LEVELS, DetectorCalibration
from dfine_core.uncertainty.score_calibration import Method
from pipeline.calibration.measure import MASSES, MeasuredDetections
from pipeline.errors import UserError

IOU = 0.5
LEAST_OBJECTS = 40  # matched objects of each half
AREAS = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, float("inf"))}  # px^2, as in COCO
EDGES = ("left", "top", "right", "bottom")
POOR_CORRELATION, POOR_ERROR = 0.15, 0.35  # widths below, or above, say little


@dataclass(frozen=True)
class Half:
    """Detections of some images: those that count, and the matched ones among them."""

    measured: MeasuredDetections  # D detections that are true or false
    is_true: Tensor  # [D]
    overlap: Tensor  # [D] IoU with the matched box, else 0
    matched: MeasuredDetections  # M matched ones above the least score
    errors: Tensor  # [M, 4] px
    true_boxes: Tensor  # [M, 4] xyxy
    images: int


@dataclass(frozen=True)
class Reliability:
    """Reliability of widths and scores on images that nothing was fitted to. Shares in [0, 1], widths in pixels."""

    objects: int
    images: int
    own_coverage: dict[
        float, tuple[float, ...]
    ]  # by mass: share of true edges in the distributions' own intervals, by edge
    width_error: float  # ENCE
    width_bins: Tensor  # [bins, 2] predicted std and RMSE
    correlation: dict[str, float]  # of std and |error|: "all", sizes, edges
    relative_correlation: float  # of both over the side
    conformal: dict[float, float]  # by coverage: share of edges inside
    conformal_boxes: dict[float, float]  # by coverage: share of boxes with all four inside
    widths: dict[
        str, tuple[float, float]
    ]  # by predictor, at the largest coverage below 0.95: mean half-width, share inside
    score_error: tuple[float, float]  # D-ECE before and after
    score_bins: tuple[Tensor, Tensor]  # [bins, 3] of both: score, precision, count
    label_aware_error: tuple[float, float]  # LaECE before and after

    @property
    def poor(self) -> str | None:
        """Sentence on widths that say little; None if they do."""
        if not self.correlation["all"] >= POOR_CORRELATION:
            return f"widths hardly follow the errors (rank correlation {self.correlation['all']:.2f})"
        if not self.width_error <= POOR_ERROR:
            return f"widths are off by {100 * self.width_error:.0f} % on average (ENCE): use the conformal half-widths"
        return None

    def to_plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "objects": self.objects,
            "images": self.images,
            "own_coverage": {f"{mass:g}": list(held) for mass, held in self.own_coverage.items()},
            "width_error": self.width_error,
            "width_bins": self.width_bins.tolist(),
            "correlation": self.correlation,
            "relative_correlation": self.relative_correlation,
            "conformal": {f"{coverage:g}": held for coverage, held in self.conformal.items()},
            "conformal_boxes": {f"{coverage:g}": held for coverage, held in self.conformal_boxes.items()},
            "widths": {name: list(values) for name, values in self.widths.items()},
            "score_error": list(self.score_error),
            "label_aware_error": list(self.label_aware_error),
        }


def fit(
    measured: MeasuredDetections,
    truth: TrueBoxes,
    images: int,
    *,
    least_score: float,
    method: Method = "temperature",
    seed: int = 0,
    sha256: str | None = None,
) -> tuple[DetectorCalibration, Reliability]:
    """Fit on a random half of the images, and report on the other.

    Args:
        images: number of images; the halves are drawn from all of them.
        least_score: of the detections that edges are calibrated for.
        sha256: of the detector's weights.

    Raises:
        UserError: a half has too few matched objects.
    """
    match = match_for_calibration(measured.found, truth, IOU)
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    in_first = torch.zeros(images, dtype=torch.bool)
    in_first[order[: images // 2]] = True
    first, second = (
        _half(measured, truth, match, chosen[measured.found.image], least_score, int(chosen.sum()))
        for chosen in (in_first, ~in_first)
    )
    if min(len(first.errors), len(second.errors)) < LEAST_OBJECTS:
        raise UserError(
            f"{len(first.errors)} and {len(second.errors)} matched detections with a score of {least_score:g} and more in the"
            f" two halves of the images, and {LEAST_OBJECTS} are needed in each: give more images or a lower --score"
        )
    edges, boxes = (
        tuple(
            fit_edge_calibration(first.matched.std, first.errors, coverage, joint, labels=first.matched.found.labels)
            for coverage in LEVELS
        )
        for joint in (False, True)
    )
    scores = _score_map(first, method)
    calibration = DetectorCalibration(edges, boxes, scores, first.images, sha256)
    return calibration, reliability(calibration, first, second)


def reliability(calibration: DetectorCalibration, fitted: Half, other: Half) -> Reliability:
    """Measure a calibration on images that it was not fitted to.

    Args:
        fitted: half that it was fitted to, which the baselines are fitted to as well.
    """
    std, errors, labels = other.matched.std, other.errors, other.matched.found.labels
    own = {
        mass: tuple(interval_coverage(other.matched.intervals[:, index], other.true_boxes).tolist())
        for index, mass in enumerate(MASSES)
    }
    width_error, width_bins = width_calibration_error(std, errors)
    boxes = other.true_boxes
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    correlation = {"all": rank_correlation(std, errors)}
    for name, (low, high) in AREAS.items():
        chosen = (area >= low) & (area < high)
        correlation[name] = rank_correlation(std[chosen], errors[chosen])
    correlation |= {name: rank_correlation(std[:, edge], errors[:, edge]) for edge, name in enumerate(EDGES)}

    # Predictors of the width at equal coverage, each with its own factor.
    coverage = max(level for level in LEVELS if level < 0.95)
    widths = {}
    for name, of_fitted, of_other in (
        ("distribution", fitted.matched.std, std),
        ("side of the box", fitted.matched.sides, other.matched.sides),
        ("constant", torch.ones_like(fitted.matched.std), torch.ones_like(std)),
    ):
        half_width = fit_edge_calibration(of_fitted, fitted.errors, coverage).half_width(of_other)
        widths[name] = float(half_width.mean()), float((errors <= half_width).double().mean())

    raw, mapped = other.measured.found.scores, calibration.scores(other.measured.found.scores)
    before, after = (detection_calibration_error(score, other.is_true) for score in (raw, mapped))
    label_aware = tuple(
        label_aware_calibration_error(score, other.measured.found.labels, other.is_true, other.overlap)
        for score in (raw, mapped)
    )
    return Reliability(
        objects=len(errors),
        images=other.images,
        own_coverage=own,
        width_error=width_error,
        width_bins=width_bins,
        correlation=correlation,
        relative_correlation=rank_correlation(std / other.matched.sides, errors / other.matched.sides),
        conformal={
            each.coverage: float((errors <= each.half_width(std, labels)).double().mean()) for each in calibration.edges
        },
        conformal_boxes={
            each.coverage: float((errors <= each.half_width(std, labels)).all(-1).double().mean())
            for each in calibration.boxes
        },
        widths=widths,
        score_error=(before[0], after[0]),
        score_bins=(before[1], after[1]),
        label_aware_error=(label_aware[0], label_aware[1]),
    )


def _half(
    measured: MeasuredDetections, truth: TrueBoxes, match: Tensor, chosen: Tensor, least_score: float, images: int
) -> Half:
    counted = chosen & (match != CROWD)
    target = match.clamp(min=0)
    overlap = torch.where(
        match >= 0, box_iou(measured.found.boxes, truth.boxes[target]) if len(truth.labels) else 0.0, 0.0
    )
    edges = counted & (match >= 0) & (measured.found.scores >= least_score)
    matched, true = measured[edges], truth.boxes[match[edges]]
    return Half(
        measured=measured[counted],
        is_true=match[counted] >= 0,
        overlap=overlap[counted],
        matched=matched,
        errors=edge_errors(matched.found.boxes, true),
        true_boxes=true,
        images=images,
    )


def _score_map(half: Half, method: Method) -> ScoreCalibration:
    try:
        return fit_score_calibration(half.measured.found.scores, half.is_true, method)
    except ValueError as error:
        raise UserError(f"scores cannot be calibrated: {error}") from None

"""Uncertainty of edges and scores: what the distributions say, how far it can be believed, and what makes it right.

FDR predicts each edge as a distribution. `edge_std` and `edge_interval` read its width; `fit_edge_calibration` turns the width
into half-widths that hold the true edge at a chosen rate; `fit_score_calibration` does the same for class scores.
"""

from dfine_core.uncertainty.edge_calibration import EdgeCalibration, fit_edge_calibration
from dfine_core.uncertainty.edges import edge_errors, edge_interval, edge_std
from dfine_core.uncertainty.matched_detections import (
    CROWD,
    UNMATCHED,
    DetectedBoxes,
    TrueBoxes,
    match_for_calibration,
)
from dfine_core.uncertainty.reliability import (
    detection_calibration_error,
    interval_coverage,
    label_aware_calibration_error,
    rank_correlation,
    width_calibration_error,
)
from dfine_core.uncertainty.score_calibration import ScoreCalibration, fit_score_calibration

__all__ = [
    "CROWD",
    "UNMATCHED",
    "DetectedBoxes",
    "EdgeCalibration",
    "ScoreCalibration",
    "TrueBoxes",
    "detection_calibration_error",
    "edge_errors",
    "edge_interval",
    "edge_std",
    "fit_edge_calibration",
    "fit_score_calibration",
    "interval_coverage",
    "label_aware_calibration_error",
    "match_for_calibration",
    "rank_correlation",
    "width_calibration_error",
]

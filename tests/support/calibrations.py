"""A calibration with known numbers, in place of a fitted one."""

import math

from dfine_core.uncertainty import EdgeCalibration, ScoreCalibration
from dfine_core.uncertainty.detector_calibration import LEVELS, DetectorCalibration
from dfine_core.uncertainty.drift import DriftReference, ImageValues

SLOPE = 0.5
FACTORS = {level: 1.0 + index for index, level in enumerate(LEVELS)}
JOINT = 1.5  # times the factor of an edge by itself


def a_calibration(sha256: str | None = None) -> DetectorCalibration:
    """Factors 1, 2, 3, 4 for the four levels, twice that of the class 1, joint ones above; and a temperature of 2."""

    def fitted(joint: bool) -> tuple[EdgeCalibration, ...]:
        times = JOINT if joint else 1.0
        return tuple(
            EdgeCalibration(times * factor, level, joint, objects=100, by_label={1: 2 * times * factor})
            for level, factor in FACTORS.items()
        )

    reference = DriftReference(0.3, (ImageValues(0.5, 0.1, 3.0), ImageValues(math.nan, math.nan, 0.0)))
    scores = ScoreCalibration("temperature", slope=SLOPE)
    return DetectorCalibration(fitted(False), fitted(True), scores, 40, sha256, reference)

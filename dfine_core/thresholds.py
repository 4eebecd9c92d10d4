"""Scores from which the detections of a class are worth keeping, measured on images with ground truth."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

WANTED_PRECISION = 0.9
Threshold = float | str  # least score of all classes, or "precision=0.9": of each class the score that reaches it
PRECISION = "precision="
NO_SCORE = 2.0  # least score that no detection has


def wanted_precision(threshold: Threshold) -> float | None:
    """Precision that a threshold asks for; None if it is a score.

    Raises:
        ValueError: it is neither, or lies outside 0..1.
    """
    if isinstance(threshold, str):
        try:
            if threshold.startswith(PRECISION) and 0 <= (wanted := float(threshold.removeprefix(PRECISION))) <= 1:
                return wanted
        except ValueError:
            pass
        raise ValueError(
            f"threshold ({threshold!r}) must be a score in 0..1, or {PRECISION}SHARE such as {PRECISION}0.9"
        )
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold ({threshold}) must lie in 0..1: it is compared with scores")
    return None


@dataclass(frozen=True)
class ClassThresholds:
    """Least scores by label, which travel with a detector; None where no score gives what is wanted."""

    best_f1: tuple[float | None, ...]  # the harmonic mean of precision and recall is largest
    at_precision: tuple[float | None, ...]  # lowest score whose detections reach `precision`
    precision: float  # wanted, in 0..1

    def to_plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "best_f1": list(self.best_f1),
            "at_precision": list(self.at_precision),
            "precision": self.precision,
        }

    @classmethod
    def from_plain(cls, content: Mapping[str, Any], num_classes: int) -> Self:
        """Read plain values.

        Raises:
            ValueError: they are no scores for `num_classes` classes.
        """
        try:
            rows = [tuple(_score(value) for value in content[name]) for name in ("best_f1", "at_precision")]
            precision = _score(content["precision"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"thresholds cannot be read: {error!r}") from None
        if precision is None or any(len(row) != num_classes for row in rows):
            raise ValueError(f"thresholds of {len(rows[0])} classes for a detector of {num_classes}")
        return cls(rows[0], rows[1], precision)


def _score(value: Any) -> float | None:
    if value is None:
        return None
    score = float(value)
    if not (math.isfinite(score) and 0 <= score <= 1):
        raise ValueError(f"threshold ({value}) must lie in 0..1: it is compared with scores")
    return score

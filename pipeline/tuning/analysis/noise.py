"""What chance alone does to a metric: the spread between trainings that differ in nothing but their seed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from pipeline.tuning.records import TrialRecord
from pipeline.tuning.space import Point, as_text

ALPHA = 0.05


@dataclass(frozen=True)
class Noise:
    """One spread for all points: the squared deviations within groups of equal points are pooled.

    It assumes that every point has the same spread. With df = 0 nothing is known and every band is infinite; with df = 2,
    three runs, Student's t already makes bands 2.2 times as wide as a known spread would.
    """

    sd: float  # of one run; NaN if unknown
    df: int  # degrees of freedom: runs minus groups
    groups: int  # points with several runs
    runs: int  # in those groups

    def band(self, runs_a: float = 1, runs_b: float = 1, alpha: float = ALPHA) -> float:
        """Half the width in which the difference of two means lies with probability 1 - alpha if nothing but chance differs."""
        if self.df < 1:
            return math.inf
        return float(stats.t.ppf(1 - alpha / 2, self.df)) * self.sd * math.sqrt(1 / runs_a + 1 / runs_b)

    def sd_interval(self, alpha: float = ALPHA) -> tuple[float, float]:
        """Where the true spread lies with probability 1 - alpha."""
        if self.df < 1:
            return 0.0, math.inf
        often, seldom = (float(stats.chi2.ppf(share, self.df)) for share in (alpha / 2, 1 - alpha / 2))
        return self.sd * math.sqrt(self.df / seldom), self.sd * math.sqrt(self.df / often)

    def text(self) -> str:
        if self.df < 1:
            return "unknown: no point was trained with two seeds"
        low, high = self.sd_interval()
        return (
            f"standard deviation {self.sd:.4f} of one run (95 %: {low:.4f} to {high:.4f}; {self.runs} runs of {self.groups}"
            f" point(s), {self.df} degrees of freedom); two single runs differ by up to {self.band():.4f} by chance"
        )


UNKNOWN = Noise(math.nan, 0, 0, 0)


def pooled(groups: Iterable[Sequence[float]]) -> Noise:
    """
    Args:
        groups: results of runs that differ in their seed alone, one sequence per point.
    """
    several = [np.asarray(group, np.float64) for group in groups if len(group) > 1]
    runs = sum(map(len, several))
    df = runs - len(several)
    if df < 1:
        return UNKNOWN
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in several)
    return Noise(math.sqrt(squares / df), df, len(several), runs)


def noise_of(records: Sequence[TrialRecord], default: Point, metric: str, evaluation: int | None = None) -> Noise:
    """
    Args:
        evaluation: at which the metric is taken; None: the final result of finished trials.
    """
    groups: dict[str, list[float]] = {}
    for record in records:
        value = record.result(metric) if evaluation is None else record.at(evaluation, metric)
        if value is not None and (evaluation is not None or record.status == "finished"):
            groups.setdefault(point_name(record.point, default), []).append(value)
    return pooled(groups.values())


def point_name(point: Mapping[str, object], default: Point) -> str:
    """What is really trained: inactive keys have the experiment's own values."""
    return as_text({**default, **point})

"""Noise of a metric: the spread between trainings that differ only in their seed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from pipeline.tuning.space import Point, canonical_text
from pipeline.tuning.trial_records import TrialRecord
from pipeline.wording import plural

ALPHA = 0.05


@dataclass(frozen=True)
class Noise:
    """Standard deviation of one run, pooled over groups of equal points.

    It assumes that every point has the same spread. With df = 0 the noise is unknown and every band is infinite. With df = 2,
    three runs, Student's t makes bands 2.2 times as wide as a known spread would.
    """

    sd: float  # standard deviation of one run; NaN if unknown
    df: int  # degrees of freedom: runs minus groups
    groups: int  # number of points with several runs
    runs: int  # number of runs in those groups

    def band(self, runs_a: float = 1, runs_b: float = 1, alpha: float = ALPHA) -> float:
        """Half-width of the interval that holds the difference of two means by chance, with probability 1 - alpha.

        Args:
            runs_a, runs_b: number of runs in each mean.
        """
        if self.df < 1:
            return math.inf
        return float(stats.t.ppf(1 - alpha / 2, self.df)) * self.sd * math.sqrt(1 / runs_a + 1 / runs_b)

    def sd_interval(self, alpha: float = ALPHA) -> tuple[float, float]:
        """Confidence interval of the standard deviation."""
        if self.df < 1:
            return 0.0, math.inf
        lower, upper = (float(stats.chi2.ppf(share, self.df)) for share in (alpha / 2, 1 - alpha / 2))
        return self.sd * math.sqrt(self.df / upper), self.sd * math.sqrt(self.df / lower)

    def text(self) -> str:
        """Describe the noise in one line."""
        if self.df < 1:
            return "unknown: no point was trained with more than one seed"
        low, high = self.sd_interval()
        return (
            f"one run has a standard deviation of {self.sd:.4f} (95 %: {low:.4f} to {high:.4f}; {self.runs} runs of"
            f" {plural(self.groups, 'point')}, {plural(self.df, 'degree')} of freedom);"
            f" two single runs differ by up to {self.band():.4f} by chance"
        )


UNKNOWN = Noise(math.nan, 0, 0, 0)


def pooled_noise(groups: Iterable[Sequence[float]]) -> Noise:
    """Pool the squared deviations within groups.

    Args:
        groups: one sequence per point: results of runs that differ only in their seed.
    """
    several = [np.asarray(group, np.float64) for group in groups if len(group) > 1]
    runs = sum(map(len, several))
    df = runs - len(several)
    if df < 1:
        return UNKNOWN
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in several)
    return Noise(math.sqrt(squares / df), df, len(several), runs)


def noise_of(records: Sequence[TrialRecord], default: Point, metric: str, evaluation: int | None = None) -> Noise:
    """Noise of a metric over all points with several seeds.

    Args:
        evaluation: number of the evaluation to compare at; None: the final result of finished trials.
    """
    groups: dict[str, list[float]] = {}
    for record in records:
        value = record.result(metric) if evaluation is None else record.at(evaluation, metric)
        if value is not None and (evaluation is not None or record.status == "finished"):
            groups.setdefault(point_name(record.point, default), []).append(value)
    return pooled_noise(groups.values())


def point_name(point: Mapping[str, object], default: Point) -> str:
    """Name of the settings that are trained: inactive keys count with the experiment's own values."""
    return canonical_text({**default, **point})

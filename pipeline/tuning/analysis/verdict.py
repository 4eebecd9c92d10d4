"""What a sweep has shown: for every setting of every key whether it is better, worse, or not to be told apart from the default.

How settings are compared: see `pipeline/tuning/analysis/effects.py`.

How confirmed points are compared. Their fresh runs at full length against the replicates of the default, with the spread of
one run pooled over all points (Student's t), again with Holm's correction. The search's own results of these points chose
them, and are left out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pipeline.tuning.analysis.effects import Effect, Mode, Word, holm, setting_effects, word
from pipeline.tuning.analysis.factors import point_text
from pipeline.tuning.analysis.noise import ALPHA, Noise, noise_of, point_name
from pipeline.tuning.records import TrialRecord
from pipeline.tuning.space import Point, Space


@dataclass(frozen=True)
class PointVerdict:
    """A confirmed point against the default."""

    point: Point
    mean: float
    runs: int
    default_mean: float
    default_runs: int
    low: float  # of the difference
    high: float
    df: int
    p: float
    p_corrected: float  # Holm, over all confirmed points
    verdict: Word
    note: str = ""

    @property
    def effect(self) -> float:
        return self.mean - self.default_mean


@dataclass(frozen=True)
class Verdict:
    metric: str
    mode: Mode
    alpha: float
    evaluation: int | None  # at which settings are compared; None if no trial came so far
    noise: Noise  # there
    final_noise: Noise  # at the end of finished trials
    effects: tuple[Effect, ...]
    points: tuple[PointVerdict, ...]
    compared: int  # runs
    left_out: dict[str, int]  # runs that could not be compared, by the reason

    def found(self, word: Word) -> int:
        return sum(effect.verdict == word for effect in self.effects)


def judge(
    records: Sequence[TrialRecord],
    *,
    space: Space,
    default: Point,
    metric: str,
    mode: Mode = "max",
    alpha: float = ALPHA,
) -> Verdict:
    """
    Args:
        default: the experiment's own values of the searched keys.
        alpha: probability with which chance alone may cause any verdict among the settings, and any among the points.
    """
    evaluation = common_evaluation(records, metric)
    rows = [] if evaluation is None else [r for r in records if r.at(evaluation, metric) is not None]
    left_out: dict[str, int] = {}
    compared = {record.id for record in rows}
    for record in records:
        if record.id not in compared:
            reason = "failed" if record.status == "failed" else "no evaluation yet"
            left_out[reason] = left_out.get(reason, 0) + 1
    noise = noise_of(rows, default, metric, evaluation)
    final_noise = noise_of(records, default, metric)
    effects: tuple[Effect, ...] = ()
    if evaluation is not None:
        values = np.array([record.at(evaluation, metric) for record in rows], np.float64)
        effects = setting_effects([r.point for r in rows], values, space, default, noise=noise, mode=mode, alpha=alpha)
    points = confirmed_points(records, default, metric, noise=final_noise, mode=mode, alpha=alpha)
    return Verdict(metric, mode, alpha, evaluation, noise, final_noise, effects, points, len(rows), left_out)


def common_evaluation(records: Sequence[TrialRecord], metric: str) -> int | None:
    """The last evaluation that all trials that ended well or were stopped have reached."""
    reached = []
    for record in records:
        if record.status in ("finished", "pruned"):
            known = [n for n in range(1, len(record.curve) + 1) if record.at(n, metric) is not None]
            reached.append(max(known, default=0))
    least = min((count for count in reached if count), default=0)
    return least or None


# Confirmed points


def confirmed_points(
    records: Sequence[TrialRecord],
    default: Point,
    metric: str,
    *,
    noise: Noise,
    mode: Mode = "max",
    alpha: float = ALPHA,
) -> tuple[PointVerdict, ...]:
    """
    Args:
        noise: of the final result of one run.
    """
    own = [v for r in records if r.phase == "replicate" and (v := _ended(r, metric)) is not None]
    groups: dict[str, tuple[Point, list[float]]] = {}
    for record in records:
        value = _ended(record, metric)
        if record.phase == "confirm" and value is not None:
            groups.setdefault(point_name(record.point, default), (record.point, []))[1].append(value)
    p_values = []
    for _, results in groups.values():
        spread = noise.sd * math.sqrt(1 / len(results) + 1 / len(own)) if own and noise.df else math.nan
        difference = float(np.mean(results)) - float(np.mean(own)) if own else math.nan
        p_values.append(float(2 * stats.t.sf(abs(difference) / spread, noise.df)) if spread > 0 else math.nan)
    note = "" if own and noise.df else "no replicates of the default: noise unknown"
    verdicts = []
    for (point, results), p, corrected in zip(groups.values(), p_values, holm(p_values), strict=True):
        mean, default_mean = float(np.mean(results)), float(np.mean(own)) if own else math.nan
        half = noise.band(len(results), len(own), alpha) if own else math.inf
        verdicts.append(
            PointVerdict(
                point=point,
                mean=mean,
                runs=len(results),
                default_mean=default_mean,
                default_runs=len(own),
                low=mean - default_mean - half,
                high=mean - default_mean + half,
                df=noise.df,
                p=p,
                p_corrected=corrected,
                verdict=word(mean - default_mean, corrected, mode, alpha),
                note=note,
            )
        )
    return tuple(verdicts)


def _ended(record: TrialRecord, metric: str) -> float | None:
    return record.result(metric) if record.status == "finished" else None


def top_points(
    records: Sequence[TrialRecord],
    default: Point,
    metric: str,
    *,
    count: int,
    mode: Mode = "max",
    latency: bool = False,
) -> list[Point]:
    """The searched points to be confirmed: those with the highest mean over their seeds, among finished trials.

    Args:
        latency: is an objective as well: points that another one beats in both come after all others.
    """
    groups: dict[str, list[TrialRecord]] = {}
    for record in sorted(records, key=lambda record: record.number):
        if record.phase == "search" and _ended(record, metric) is not None:
            groups.setdefault(point_name(record.point, default), []).append(record)
    groups.pop(point_name({}, default), None)  # its replicates are its confirmation
    runs = list(groups.values())
    sign = 1 if mode == "max" else -1
    means = np.array([sign * np.mean([r.final[metric] for r in group]) for group in runs])
    ahead: set[int] = set()
    if latency:
        known = [[r.latency_ms for r in group if r.latency_ms is not None] for group in runs]
        ahead = set(pareto_front(np.array([np.mean(times) if times else np.inf for times in known]), means))
    order = sorted(range(len(runs)), key=lambda place: (place not in ahead, -means[place]))
    return [runs[place][0].point for place in order[:count]]


def pareto_front(costs: NDArray[np.float64], results: NDArray[np.float64]) -> list[int]:
    """Places of those that no other beats in both, the cheapest first."""
    front: list[int] = []
    for place in np.lexsort((-results, costs)).tolist():
        if not front or results[place] > results[front[-1]]:
            front.append(place)
    return front


# For people


def as_text(verdict: Verdict) -> str:
    """A few lines for the console: what was found, never only what came out on top."""
    lines = [f"{verdict.metric} at the end: {verdict.final_noise.text()}"]
    for point in verdict.points:
        lines += [
            f"  {point.verdict.upper()}: {point_text(point.point)}: {point.effect:+.4f} ({point.low:+.4f} to"
            f" {point.high:+.4f}; {point.runs} runs against {point.default_runs} of the default){_because(point.note)}"
        ]
    if not verdict.points:
        lines.append("  no point was confirmed")
    if verdict.evaluation is None:
        return "\n".join([*lines, "settings: no trial has an evaluation yet"])
    lines.append(f"settings, after evaluation {verdict.evaluation}, the last that all trials reached:")
    for effect in verdict.effects:
        shown = "" if math.isnan(effect.effect) else f" {effect.effect:+.4f} ({effect.low:+.4f} to {effect.high:+.4f})"
        lines.append(
            f"  {effect.key} = {effect.setting} against {effect.reference}: {effect.verdict}{shown}, {effect.runs} runs"
            + _because(effect.note)
        )
    return "\n".join(lines)


def _because(note: str) -> str:
    return f" ({note})" if note else ""

"""Verdict of a sweep: every setting and every confirmed point is better, worse, or not distinguishable from the default.

Settings are compared as in `effects.py`. Confirmed points are compared by their fresh runs at full length with the replicates of
the default: Student's t with the standard deviation of one run pooled over all points, and Holm's correction. The search's own
results chose these points, and are left out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pipeline.tuning.analysis.effects import Effect, Mode, VerdictWord, holm, setting_effects, verdict_word
from pipeline.tuning.analysis.factors import point_text
from pipeline.tuning.analysis.noise import ALPHA, Noise, noise_of, point_name
from pipeline.tuning.space import Point, Space
from pipeline.tuning.trial_records import TrialRecord


@dataclass(frozen=True)
class PointVerdict:
    """A confirmed point compared with the default."""

    point: Point
    mean: float
    runs: int
    default_mean: float
    default_runs: int
    low: float  # interval of the difference, at 1 - alpha
    high: float
    df: int
    p: float
    p_corrected: float  # Holm, over all confirmed points
    verdict: VerdictWord
    note: str = ""

    @property
    def effect(self) -> float:
        """Difference of the means."""
        return self.mean - self.default_mean


@dataclass(frozen=True)
class SweepVerdict:
    """Everything that a sweep has shown."""

    metric: str
    mode: Mode
    alpha: float
    evaluation: int | None  # number of the evaluation at which settings are compared; None before any
    noise: Noise  # noise at that evaluation
    final_noise: Noise  # final results of finished trials
    effects: tuple[Effect, ...]
    points: tuple[PointVerdict, ...]
    compared: int  # number of runs
    left_out: dict[str, int]  # number of runs that could not be compared, by reason


def judge_sweep(
    records: Sequence[TrialRecord],
    *,
    space: Space,
    default: Point,
    metric: str,
    mode: Mode = "max",
    alpha: float = ALPHA,
) -> SweepVerdict:
    """Compare all settings and all confirmed points with the default.

    Args:
        default: the experiment's own values of the searched keys.
        alpha: probability that chance causes any verdict among the settings, and likewise among the points.
    """
    # 1. All runs that reached the common evaluation are compared there.
    evaluation = common_evaluation(records, metric)
    rows = [] if evaluation is None else [r for r in records if r.at(evaluation, metric) is not None]
    left_out: dict[str, int] = {}
    compared = {record.id for record in rows}
    for record in records:
        if record.id not in compared:
            reason = "failed" if record.status == "failed" else "no evaluation yet"
            left_out[reason] = left_out.get(reason, 0) + 1

    # 2. Settings at the common evaluation, points at the end.
    noise = noise_of(rows, default, metric, evaluation)
    final_noise = noise_of(records, default, metric)
    effects: tuple[Effect, ...] = ()
    if evaluation is not None:
        values = np.array([record.at(evaluation, metric) for record in rows], np.float64)
        effects = setting_effects([r.point for r in rows], values, space, default, noise=noise, mode=mode, alpha=alpha)
    points = confirmed_points(records, default, metric, noise=final_noise, mode=mode, alpha=alpha)
    return SweepVerdict(metric, mode, alpha, evaluation, noise, final_noise, effects, points, len(rows), left_out)


def common_evaluation(records: Sequence[TrialRecord], metric: str) -> int | None:
    """Last evaluation that every finished or pruned trial has reached."""
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
    """Compare confirmed points with the replicates of the default.

    Args:
        noise: of the final result of one run.
    """
    # 1. Fresh results of the default and of each point.
    own = [v for r in records if r.phase == "replicate" and (v := _ended(r, metric)) is not None]
    groups: dict[str, tuple[Point, list[float]]] = {}
    for record in records:
        value = _ended(record, metric)
        if record.phase == "confirm" and value is not None:
            groups.setdefault(point_name(record.point, default), (record.point, []))[1].append(value)

    # 2. Student's t, with the pooled spread of one run.
    p_values = []
    for _, results in groups.values():
        spread = noise.sd * math.sqrt(1 / len(results) + 1 / len(own)) if own and noise.df else math.nan
        difference = float(np.mean(results)) - float(np.mean(own)) if own else math.nan
        p_values.append(float(2 * stats.t.sf(abs(difference) / spread, noise.df)) if spread > 0 else math.nan)
    note = "" if own and noise.df else "no replicates of the default: noise unknown"

    # 3. Verdicts, corrected for the number of points.
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
                verdict=verdict_word(mean - default_mean, corrected, mode, alpha),
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
    """Points to confirm: those with the best mean over their seeds, among finished trials of the search.

    Args:
        latency: latency is an objective too: points on the Pareto front come first.
    """
    groups: dict[str, list[TrialRecord]] = {}
    for record in sorted(records, key=lambda record: record.number):
        if record.phase == "search" and _ended(record, metric) is not None:
            groups.setdefault(point_name(record.point, default), []).append(record)
    groups.pop(point_name({}, default), None)  # the default's replicates are its confirmation
    runs = list(groups.values())
    sign = 1 if mode == "max" else -1
    means = np.array([sign * np.mean([r.final[metric] for r in group]) for group in runs])
    front: set[int] = set()
    if latency:
        known = [[r.latency_ms for r in group if r.latency_ms is not None] for group in runs]
        front = set(pareto_front(np.array([np.mean(times) if times else np.inf for times in known]), means))
    order = sorted(range(len(runs)), key=lambda n: (n not in front, -means[n]))
    return [runs[n][0].point for n in order[:count]]


def pareto_front(costs: NDArray[np.float64], results: NDArray[np.float64]) -> list[int]:
    """Indices of the Pareto front, the cheapest first."""
    front: list[int] = []
    for index in np.lexsort((-results, costs)).tolist():
        if not front or results[index] > results[front[-1]]:
            front.append(index)
    return front


# Text


def verdict_text(verdict: SweepVerdict) -> str:
    """Describe the verdict for the console. It never names a bare "best"."""
    lines = [f"noise of the final {verdict.metric}: {verdict.final_noise.text()}"]
    for point in verdict.points:
        lines += [
            f"  {point.verdict.upper()}: {point_text(point.point)}: {point.effect:+.4f} ({point.low:+.4f} to"
            f" {point.high:+.4f}; {point.runs} runs, default {point.default_runs}){_in_brackets(point.note)}"
        ]
    if not verdict.points:
        lines.append("  no point was confirmed")
    if verdict.evaluation is None:
        return "\n".join([*lines, "settings: no trial has been evaluated yet"])
    lines.append(f"settings, compared after evaluation {verdict.evaluation}, the last that all trials reached:")
    for effect in verdict.effects:
        change = "" if math.isnan(effect.effect) else f" {effect.effect:+.4f} ({effect.low:+.4f} to {effect.high:+.4f})"
        lines.append(
            f"  {effect.key} = {effect.setting} vs. {effect.reference}: {effect.verdict}{change}, {effect.runs} runs"
            + _in_brackets(effect.note)
        )
    return "\n".join(lines)


def _in_brackets(note: str) -> str:
    return f" ({note})" if note else ""

"""Effect of each setting of each key on the metric, estimated from runs of many points.

Common evaluation. Trials that were stopped early have no final result, and leaving them out would keep only the lucky ones. So
all trials are compared at the last evaluation that every one of them reached, usually the first rung.

Model. An additive model (one effect per setting of each key, ordinary least squares) separates keys that were varied together.
Its residual spread contains noise and interactions. A key that is inactive in a point counts with the experiment's own value.
Runs of one point are not independent points: if points scatter more about the model than seeds do, the larger spread counts.

Collapsed runs, for instance from a learning rate that is far too high, would drown every other effect. Settings under which most
runs collapsed are judged separately, and left out of the comparison of other keys. Elsewhere collapsed runs are counted but do
not enter the effect.

Correction. The p-values of all settings are corrected together (Holm): with probability 1 - alpha no verdict is due to chance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pipeline.tuning.analysis.factors import Factor, factors_of
from pipeline.tuning.analysis.noise import ALPHA, Noise, point_name
from pipeline.tuning.space import Point, Space

VerdictWord = Literal["better", "worse", "not distinguishable"]
Mode = Literal["max", "min"]
COLLAPSED = 0.5  # a run that loses more than this share of the default's result has collapsed
COLLAPSED_SDS = 6.0  # and more than so many standard deviations, if the noise is known
MIN_DF = 3  # degrees of freedom of the additive model; with fewer, keys are compared one by one


@dataclass(frozen=True)
class Effect:
    """A setting compared with the default's setting of the same key. A positive effect is a larger metric."""

    key: str
    setting: str
    reference: str
    effect: float  # NaN if it cannot be estimated
    low: float  # interval of this single comparison, at 1 - alpha
    high: float
    runs: int
    points: int
    reference_runs: int
    collapsed: int  # number of collapsed runs with this setting
    df: int
    p: float
    p_corrected: float  # Holm, over all settings of all keys
    verdict: VerdictWord
    note: str = ""


@dataclass(frozen=True)
class _Test:
    """Comparison of one setting with the reference, before correction."""

    factor: Factor
    level: int
    effect: float
    error: float  # standard error
    df: int
    runs: int
    points: int
    reference_runs: int
    note: str = ""
    collapsed: int = 0

    @property
    def p(self) -> float:
        """Two-sided p-value of Student's t; NaN if there was no comparison."""
        if self.df < 1 or math.isnan(self.effect):
            return math.nan
        if self.error == 0:
            return 0.0 if self.effect else 1.0
        return float(2 * stats.t.sf(abs(self.effect) / self.error, self.df))


def setting_effects(
    points: Sequence[Point],
    values: NDArray[np.float64],
    space: Space,
    default: Point,
    *,
    noise: Noise,
    mode: Mode = "max",
    alpha: float = ALPHA,
) -> tuple[Effect, ...]:
    """Estimate the effect of every setting of every key.

    Args:
        points: one per run.
        values: [n] metric of each run, all after the same number of evaluations.
    """
    # 1. Settings as levels of factors.
    names = np.array([point_name(point, default) for point in points])
    factors = factors_of(space, default, len(set(names.tolist())))
    levels = np.array([[f.level({**default, **point}[f.key]) for f in factors] for point in points], np.int64)
    levels = levels.reshape(len(points), len(factors))

    # 2. Settings under which most runs collapsed.
    collapsed = _collapsed(levels, values, factors, noise, mode)
    settings = [(c, level) for c, f in enumerate(factors) for level in range(len(f.labels)) if level != f.reference]
    broken = _collapsing_settings(collapsed, levels, settings)

    # 3. Compare each setting, without collapsed runs other than its own.
    tests = []
    for column, level in settings:
        own = levels[:, column] == level
        kept = ~collapsed | (own if (column, level) in broken else False)
        for other, other_level in broken - {(column, level)}:
            kept &= levels[:, other] != other_level
        test = _test(factors, column, level, levels[kept], values[kept], names[kept])
        tests.append(replace(test, collapsed=int(collapsed[own].sum())))

    # 4. Correct for the number of comparisons.
    corrected = holm([test.p for test in tests])
    return tuple(_effect(test, p, mode, alpha) for test, p in zip(tests, corrected, strict=True))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction. NaN stays NaN, and does not count as a comparison."""
    known = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    corrected, running = [math.nan] * len(p_values), 0.0
    for rank, (p, index) in enumerate(known):
        running = max(running, min(1.0, (len(known) - rank) * p))
        corrected[index] = running
    return corrected


def _collapsed(
    levels: NDArray[np.int64], values: NDArray[np.float64], factors: Sequence[Factor], noise: Noise, mode: Mode
) -> NDArray[np.bool_]:
    """[n] True for runs that lost most of the default's result."""
    reference = np.array([factor.reference for factor in factors])
    own = values[(levels == reference).all(1)]
    usual = float(np.median(own if len(own) else values))
    margin = max(COLLAPSED * abs(usual), COLLAPSED_SDS * noise.sd if noise.df else 0.0)
    return ((1 if mode == "max" else -1) * (usual - values)) > margin


def _collapsing_settings(
    collapsed: NDArray[np.bool_], levels: NDArray[np.int64], settings: Sequence[tuple[int, int]]
) -> set[tuple[int, int]]:
    """Settings under which most runs collapsed, found greedily: the one that explains most, then the next without its runs."""
    broken: set[tuple[int, int]] = set()
    rest = np.ones(len(levels), bool)
    while True:
        excess = {
            (column, level): int(np.where(collapsed, 1, -1)[rest & (levels[:, column] == level)].sum())
            for column, level in settings
        }
        worst = max(excess, key=lambda setting: excess[setting], default=None)
        if worst is None or excess[worst] <= 0:
            return broken
        broken.add(worst)
        rest &= levels[:, worst[0]] != worst[1]


def _test(
    factors: Sequence[Factor],
    column: int,
    level: int,
    levels: NDArray[np.int64],
    values: NDArray[np.float64],
    names: NDArray[np.str_],
) -> _Test:
    factor = factors[column]
    chosen, reference = levels[:, column] == level, levels[:, column] == factor.reference
    runs, points = int(chosen.sum()), len(set(names[chosen].tolist()))
    counts = (runs, points, int(reference.sum()))
    untested = _Test(factor, level, math.nan, math.nan, 0, *counts)
    if not runs or not reference.any():
        return replace(untested, note="no run to compare" if not runs else "the default's setting was not tried")
    every_term = [(c, other) for c in range(len(factors)) for other in sorted(set(levels[:, c].tolist()))]
    for terms, note in (
        (every_term, ""),
        ([(c, other) for c, other in every_term if c == column], "other keys were not separated: too few trials"),
    ):
        terms = [(c, other) for c, other in terms if other != factors[c].reference]
        design = np.column_stack([np.ones(len(levels)), *(levels[:, c] == other for c, other in terms)]).astype(float)
        contrast = np.zeros(design.shape[1])
        contrast[1 + terms.index((column, level))] = 1
        effect, error, df = _contrast(design, values, contrast, names)
        if df >= MIN_DF or (note and df >= 1):
            return _Test(factor, level, effect, error, df, *counts, note)
    return replace(untested, note="too few trials to separate it from other keys, and no replicates")


def _contrast(
    design: NDArray[np.float64], values: NDArray[np.float64], contrast: NDArray[np.float64], names: NDArray[np.str_]
) -> tuple[float, float, int]:
    """Estimate, standard error and degrees of freedom; df 0 if the design does not identify the contrast."""
    gram = design.T @ design  # counts: exact, and small for any number of runs
    inverse = np.linalg.pinv(gram, rcond=1e-10, hermitian=True) @ design.T
    if np.abs(contrast - contrast @ inverse @ design).max() > 1e-8:
        return math.nan, math.nan, 0  # always tried together with another setting
    coefficients = inverse @ values
    residuals = values - design @ coefficients
    rank = int(np.linalg.matrix_rank(gram, hermitian=True))
    variance, df = _residual_variance(residuals, len(values) - rank, values, names)
    if df < 1:
        return math.nan, math.nan, 0
    weights = contrast @ inverse
    return float(contrast @ coefficients), math.sqrt(variance * float(weights @ weights)), df


def _residual_variance(
    residuals: NDArray[np.float64], df: int, values: NDArray[np.float64], names: NDArray[np.str_]
) -> tuple[float, int]:
    """Variance about the model, or of points about the model if that is larger: seeds of one point are not new points."""
    if df < 1:
        return math.nan, 0
    total = float(residuals @ residuals)
    _, index = np.unique(names, return_inverse=True)
    counts = np.bincount(index)
    means = np.bincount(index, values) / counts
    pure = float(((values - means[index]) ** 2).sum())
    pure_df = len(values) - len(counts)
    lack, lack_df = max(total - pure, 0.0), df - pure_df
    if pure_df and lack_df > 0 and lack / lack_df > total / df:
        return lack / lack_df, lack_df
    return total / df, df


def _effect(test: _Test, corrected: float, mode: Mode, alpha: float) -> Effect:
    half = float(stats.t.ppf(1 - alpha / 2, test.df)) * test.error if test.df else math.nan
    return Effect(
        key=test.factor.key,
        setting=test.factor.labels[test.level],
        reference=test.factor.labels[test.factor.reference],
        effect=test.effect,
        low=test.effect - half,
        high=test.effect + half,
        runs=test.runs,
        points=test.points,
        reference_runs=test.reference_runs,
        collapsed=test.collapsed,
        df=test.df,
        p=test.p,
        p_corrected=corrected,
        verdict=verdict_word(test.effect, corrected, mode, alpha),
        note=test.note,
    )


def verdict_word(effect: float, p: float, mode: Mode, alpha: float) -> VerdictWord:
    """Verdict on an effect with its corrected p-value."""
    if math.isnan(p) or p > alpha:
        return "not distinguishable"
    return "better" if (effect > 0) == (mode == "max") else "worse"

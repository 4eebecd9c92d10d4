"""Importance of each key for being among the best trials, with its uncertainty and a threshold of chance.

PED-ANOVA (arXiv:2304.10255, Optuna) compares the values of a key among the best trials with its values among all. Divided by the
variance of "being among the best", it is the share of that variance which the key explains by itself. Keys that matter only
in combination, or that are inactive in most trials, have a small importance.

Uncertainty: the spread over random halves of the trials, which equals the standard error of the whole (delete-half jackknife).
Bootstrap resampling would count copies as agreement. Chance: the 95th percentile with shuffled results. An importance below it
means nothing.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

from pipeline.tuning.analysis.effects import Mode
from pipeline.tuning.analysis.verdict import common_evaluation
from pipeline.tuning.space import Point, Space, category, distribution
from pipeline.tuning.trial_records import TrialRecord

BEST_SHARE = 0.25  # share of the trials that count as the best
MIN_TRIALS = 8
DRAWS, FEWER_DRAWS = 60, 20  # random halves, and shuffles; many trials need fewer
MANY = 200
CHANCE = 0.95


@dataclass(frozen=True)
class Importance:
    """Importance of one key."""

    key: str
    share: float  # explained share of the variance of being among the best
    low: float  # 95 % interval
    high: float
    chance: float  # 95th percentile for a key without any effect

    @property
    def counts(self) -> bool:
        """True if the importance exceeds the threshold of chance."""
        return self.share > self.chance


def importances(
    records: Sequence[TrialRecord], space: Space, metric: str, *, mode: Mode = "max", seed: int = 0
) -> tuple[Importance, ...]:
    """Importance of every key, largest first; empty with fewer than `MIN_TRIALS` searched trials at a common evaluation."""
    evaluation = common_evaluation(records, metric)
    if evaluation is None:
        return ()
    rows = [(r.point, v) for r in records if r.phase == "search" and (v := r.at(evaluation, metric)) is not None]
    if len(rows) < MIN_TRIALS:
        return ()
    sign = -1 if mode == "max" else 1  # the evaluator minimizes
    values = sign * np.array([value for _, value in rows])
    study = _study_of_points([point for point, _ in rows], space)
    generator = np.random.default_rng(seed)
    keys = [key for key in space if any(key in point for point, _ in rows)]
    draws = DRAWS if len(rows) <= MANY else FEWER_DRAWS
    shares = _shares(study, values, keys)
    halves = np.stack([_shares(study, _half(values, generator), keys) for _ in range(draws)])
    shuffled = np.stack([_shares(study, generator.permutation(values), keys) for _ in range(draws)])
    chance = np.quantile(shuffled, CHANCE, axis=0)
    errors = 1.96 * halves.std(0)
    result = [
        Importance(key, share, max(0.0, share - error), min(1.0, share + error), limit)
        for key, share, error, limit in zip(keys, shares.tolist(), errors.tolist(), chance.tolist(), strict=True)
    ]
    return tuple(sorted(result, key=lambda one: -one.share))


def _study_of_points(points: Sequence[Point], space: Space) -> optuna.Study:
    """Study of the points with a dummy value: the results are passed at each evaluation of importance."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    optuna.logging.set_verbosity(verbosity)
    distributions = {key: distribution(domain) for key, domain in space.items()}
    for point in points:
        values = {key: category(space[key], v) if space[key].listed else v for key, v in point.items()}
        study.add_trial(
            optuna.create_trial(params=values, distributions={key: distributions[key] for key in values}, value=0.0)
        )
    return study


def _half(values: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """Values with a random half set to NaN, which removes those trials."""
    kept = generator.permutation(len(values)) < math.ceil(len(values) / 2)
    return np.where(kept, values, np.nan)


def _shares(study: optuna.Study, values: NDArray[np.float64], keys: Sequence[str]) -> NDArray[np.float64]:
    """[keys] explained share of the variance."""
    count = int(np.isfinite(values).sum())
    best = math.ceil(BEST_SHARE * count) / count
    with warnings.catch_warnings():
        # Expected: `normalize` is experimental, low values are good, a branch has few trials.
        warnings.simplefilter("ignore")
        importance = get_param_importances(
            study,
            evaluator=PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE),
            params=list(keys),
            target=lambda trial: float(values[trial.number]),
            normalize=False,
        )
    shares: NDArray[np.float64] = np.array([importance[key] for key in keys]) / (best * (1 - best))
    return np.minimum(shares, 1.0)  # estimated densities may overshoot

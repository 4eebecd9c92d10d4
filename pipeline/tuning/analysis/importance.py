"""Which keys decide whether a trial is among the better ones, how sure that is, and what chance alone would show.

PED-ANOVA (arXiv:2304.10255, Optuna): how far the values of a key among the best trials differ from those among all. Divided
by the variance of "being among the best", it is the share of that variance which the key explains by itself. Keys that
matter only together, or that are inactive in most trials, come out small.

Uncertainty: the spread over random halves of the trials, which for a half equals the standard error of the whole (the
delete-half jackknife); resampling with replacement would take copies for agreement. Chance: the 95th percentile with the
results shuffled among the trials. An importance below it says nothing.
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
from pipeline.tuning.records import TrialRecord
from pipeline.tuning.space import Point, Space, category, distribution

BEST_SHARE = 0.25  # of the trials
LEAST_TRIALS = 8
DRAWS, FEWER_DRAWS = 60, 20  # halves, and shuffles; with many trials both spread less, and take longer
MANY = 200
CHANCE = 0.95


@dataclass(frozen=True)
class Importance:
    key: str
    share: float  # of the variance of being among the best that the key explains alone
    low: float  # 95 % interval
    high: float
    chance: float  # what a key without any effect stays below, 95 times in 100

    @property
    def counts(self) -> bool:
        """Whether it is more than chance would show."""
        return self.share > self.chance


def importances(
    records: Sequence[TrialRecord], space: Space, metric: str, *, mode: Mode = "max", seed: int = 0
) -> tuple[Importance, ...]:
    """The most important key first; empty with fewer than `LEAST_TRIALS` searched trials at a common evaluation."""
    evaluation = common_evaluation(records, metric)
    if evaluation is None:
        return ()
    rows = [(r.point, v) for r in records if r.phase == "search" and (v := r.at(evaluation, metric)) is not None]
    if len(rows) < LEAST_TRIALS:
        return ()
    sign = -1 if mode == "max" else 1  # the evaluator takes low values for good
    values = sign * np.array([value for _, value in rows])
    study = _study([point for point, _ in rows], space)
    generator = np.random.default_rng(seed)
    keys = [key for key in space if any(key in point for point, _ in rows)]
    draws = DRAWS if len(rows) <= MANY else FEWER_DRAWS
    found = _shares(study, values, keys)
    halves = np.stack([_shares(study, _half(values, generator), keys) for _ in range(draws)])
    shuffled = np.stack([_shares(study, generator.permutation(values), keys) for _ in range(draws)])
    chance = np.quantile(shuffled, CHANCE, axis=0)
    errors = 1.96 * halves.std(0)
    result = [
        Importance(key, share, max(0.0, share - error), min(1.0, share + error), limit)
        for key, share, error, limit in zip(keys, found.tolist(), errors.tolist(), chance.tolist(), strict=True)
    ]
    return tuple(sorted(result, key=lambda one: -one.share))


def _study(points: Sequence[Point], space: Space) -> optuna.Study:
    """With a value of no meaning: what is looked at is handed over at each call."""
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
    """NaN, which takes a trial out, for half of them."""
    kept = generator.permutation(len(values)) < math.ceil(len(values) / 2)
    return np.where(kept, values, np.nan)


def _shares(study: optuna.Study, values: NDArray[np.float64], keys: Sequence[str]) -> NDArray[np.float64]:
    """[keys] of the explained variance."""
    count = int(np.isfinite(values).sum())
    best = math.ceil(BEST_SHARE * count) / count
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # that `normalize` is experimental, that low is good, that a branch has few trials
        found = get_param_importances(
            study,
            evaluator=PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE),
            params=list(keys),
            target=lambda trial: float(values[trial.number]),
            normalize=False,
        )
    shares: NDArray[np.float64] = np.array([found[key] for key in keys]) / (best * (1 - best))
    return np.minimum(shares, 1.0)  # densities are estimated, and may overshoot

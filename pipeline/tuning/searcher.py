"""Ray Tune searchers: points of earlier starts first, then points from Optuna, random search or a grid."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import optuna
from ray.tune.search import Searcher

from pipeline.tuning.space import (
    Point,
    canonical_text,
    category,
    distribution,
    grid_points,
    is_active,
    random_point,
    sampling_order,
    suggest_point,
)
from pipeline.tuning.sweep import LOWER_IS_BETTER, Sweep, Trial, search_trials
from pipeline.tuning.trial_records import ENDED, TrialRecord

FinishTrial = Callable[[Trial, bool], TrialRecord]  # `TrialStore.finish`; the second argument: Tune saw the trial fail


class UnsavedSearcher(Searcher):
    """Searcher that leaves nothing in Tune's own files: the next start reads those of the trials.

    Tune pickles its searcher next to the trials. The settings of a sweep may hold the password of its tracking server.
    """

    def __getstate__(self) -> dict[str, Any]:
        """Empty: nobody reads the pickle."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Save nothing."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing."""


class SpaceSearcher(UnsavedSearcher):
    """Searcher of the search phase: each point is trained with every seed before the next point begins.

    Args:
        first: trials before the first point: a replicate of the default, which the scheduler compares points with.
        known: records of earlier starts.
        finish: records how a trial ended.
        ends_at: no point begins later; seconds since 1970.
    """

    def __init__(
        self,
        sweep: Sweep,
        first: Sequence[Trial],
        known: Sequence[TrialRecord],
        finish: FinishTrial,
        ends_at: float,
    ) -> None:
        super().__init__(metric=sweep.metric, mode=sweep.mode)
        self._sweep, self._finish, self._ends_at = sweep, finish, ends_at
        self.exhausted = False  # no trial is left to begin
        self._status = {record.id: record.status for record in known}
        searched = sorted((record for record in known if record.phase == "search"), key=lambda record: record.number)
        self._known_points = list({canonical_text(record.point): record.point for record in searched}.values())
        self._waiting = list(first)
        self._running: dict[str, Trial] = {}  # keyed by Tune's trial id
        self._ended: dict[str, list[TrialRecord]] = {}  # keyed by the point's text
        self._asked: dict[str, optuna.Trial] = {}  # keyed by the point's text
        self._begun = 0  # number of points
        self._grid = grid_points(sweep.space) if sweep.searcher.kind == "grid" else []
        self._study = _optuna_study(sweep) if sweep.searcher.kind == "optuna" else None

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # Ray's lacks FINISHED
        """Next trial of the current point, or of a new one."""
        if not self._waiting:
            point = self._next_point()
            if point is None:
                self.exhausted = True
                return str(Searcher.FINISHED)
            self._waiting = search_trials(self._sweep, point, self._begun * self._sweep.seeds_per_point)
            self._begun += 1
        trial = self._waiting.pop(0)
        self._running[trial_id] = trial
        return {"trial": asdict(trial), "ended": self._status.get(trial.id) in ENDED}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Ignore single evaluations: the search learns from whole trials."""

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Record the end of a trial; after the last seed of a point, pass its results to Optuna."""
        trial = self._running.pop(trial_id)
        record = self._finish(trial, error)
        if trial.phase != "search":
            return
        name = canonical_text(trial.point)
        records = self._ended.setdefault(name, [])
        records.append(record)
        if len(records) == self._sweep.seeds_per_point and self._study is not None:
            self._add_to_study(trial.point, records, self._asked.pop(name, None))

    def _next_point(self) -> Point | None:
        if self._known_points:
            return self._known_points.pop(0)
        sweep = self._sweep
        if time.time() > self._ends_at or (sweep.trials is not None and self._begun >= sweep.trials):
            return None
        if sweep.searcher.kind == "grid":
            return self._grid[self._begun] if self._begun < len(self._grid) else None
        if self._study is None:
            return random_point(sweep.space, [sweep.searcher.seed, self._begun])
        asked = self._study.ask()
        point = suggest_point(sweep.space, asked)
        if (
            canonical_text(point) in self._asked or canonical_text(point) in self._ended
        ):  # training it again would teach nothing
            self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
            point = random_point(sweep.space, [sweep.searcher.seed, self._begun])
        else:
            self._asked[canonical_text(point)] = asked
        return point

    def _add_to_study(self, point: Point, records: Sequence[TrialRecord], asked: optuna.Trial | None) -> None:
        """Report a point's mean over its seeds: complete, pruned at its last evaluation, or failed."""
        assert self._study is not None
        metric, objectives = self._sweep.metric, self._sweep.objectives
        finished = [record for record in records if record.status == "finished"]
        values = [_mean([record.result(name) for record in finished]) for name in objectives]
        curves = [value for record in records if (value := record.at(len(record.curve), metric)) is not None]
        state, given = optuna.trial.TrialState.FAIL, None
        evaluations: dict[int, float] = {}
        if all(math.isfinite(value) for value in values):
            state, given = optuna.trial.TrialState.COMPLETE, values
        elif curves and len(objectives) == 1:
            state = optuna.trial.TrialState.PRUNED
            evaluations = {max(len(record.curve) for record in records): fmean(curves)}
        if asked is not None:
            for number, value in evaluations.items():
                asked.report(value, number)
            self._study.tell(asked, given, state)
            return
        space = self._sweep.space
        inside = [
            key for key in sampling_order(space) if is_active(space[key], point) and space[key].allows(point.get(key))
        ]
        self._study.add_trial(
            optuna.trial.create_trial(
                state=state,
                values=given,
                params={key: category(space[key], point[key]) if space[key].listed else point[key] for key in inside},
                distributions={key: distribution(space[key]) for key in inside},
                intermediate_values=evaluations,
            )
        )


class FixedTrials(UnsavedSearcher):
    """Searcher of the confirmation phase: a fixed list of trials, in order."""

    def __init__(self, trials: Sequence[Trial], finish: FinishTrial) -> None:
        super().__init__()
        self._trials, self._finish = list(trials), finish
        self.exhausted = False  # no trial is left to begin
        self._running: dict[str, Trial] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # Ray's lacks FINISHED
        """Next trial of the list."""
        if not self._trials:
            self.exhausted = True
            return str(Searcher.FINISHED)
        self._running[trial_id] = self._trials.pop(0)
        return {"trial": asdict(self._running[trial_id]), "ended": False}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Record the end of a trial."""
        self._finish(self._running.pop(trial_id), error)


def _optuna_study(sweep: Sweep) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    minimize, maximize = optuna.study.StudyDirection.MINIMIZE, optuna.study.StudyDirection.MAXIMIZE
    direction = maximize if sweep.mode == "max" else minimize
    directions = [minimize if name in LOWER_IS_BETTER else direction for name in sweep.objectives]
    sampler = optuna.samplers.TPESampler(seed=sweep.searcher.seed, constant_liar=True)
    return optuna.create_study(directions=directions, sampler=sampler)


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return fmean(known) if known else math.nan

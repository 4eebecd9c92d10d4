"""Which point is tried next, as a searcher of Ray Tune: those of an earlier start, then what Optuna, chance or a grid say."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import optuna
from ray.tune.search import Searcher

from pipeline.tuning.curves import ENDED
from pipeline.tuning.records import TrialRecord
from pipeline.tuning.space import Point, active, as_text, category, distribution, grid, ordered, random, suggest
from pipeline.tuning.sweep import LATENCY, Sweep, Trial, search_trials

SettleTrial = Callable[[Trial, bool], TrialRecord]  # what a trial came to; the second says whether Tune saw it fail


class Points(Searcher):
    """
    Args:
        first: trials before any point is drawn: the default, so that what is searched is compared with it from the beginning.
        known: trials of the search in earlier starts.
        settle: asked when a trial has ended.
        ends_at: no point is begun later; seconds since 1970.
    """

    def __init__(
        self,
        sweep: Sweep,
        first: Sequence[Trial],
        known: Sequence[TrialRecord],
        settle: SettleTrial,
        ends_at: float,
    ) -> None:
        super().__init__(metric=sweep.metric, mode=sweep.mode)
        self._sweep, self._settle, self._ends_at = sweep, settle, ends_at
        self.exhausted = False  # nothing is left to begin
        self._status = {record.id: record.status for record in known}
        searched = sorted((record for record in known if record.phase == "search"), key=lambda record: record.number)
        self._known_points = list({as_text(record.point): record.point for record in searched}.values())
        self._waiting = list(first)
        self._running: dict[str, Trial] = {}  # by Tune's id
        self._ended: dict[str, list[TrialRecord]] = {}  # by point
        self._asked: dict[str, optuna.Trial] = {}  # by point
        self._begun = 0  # points
        self._grid = grid(sweep.space) if sweep.searcher.kind == "grid" else []
        self._study = _study(sweep) if sweep.searcher.kind == "optuna" else None

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # Ray's lacks FINISHED
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
        """Searchers learn from whole trials."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self._running.pop(trial_id)
        record = self._settle(trial, error)
        if trial.phase != "search":
            return
        name = as_text(trial.point)
        records = self._ended.setdefault(name, [])
        records.append(record)
        if len(records) == self._sweep.seeds_per_point and self._study is not None:
            self._tell(trial.point, records, self._asked.pop(name, None))

    def _next_point(self) -> Point | None:
        if self._known_points:
            return self._known_points.pop(0)
        sweep = self._sweep
        if time.time() > self._ends_at or (sweep.trials is not None and self._begun >= sweep.trials):
            return None
        if sweep.searcher.kind == "grid":
            return self._grid[self._begun] if self._begun < len(self._grid) else None
        if self._study is None:
            return random(sweep.space, [sweep.searcher.seed, self._begun])
        asked = self._study.ask()
        point = suggest(sweep.space, asked)
        if as_text(point) in self._asked or as_text(point) in self._ended:  # nothing is learnt by training it again
            self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
            point = random(sweep.space, [sweep.searcher.seed, self._begun])
        else:
            self._asked[as_text(point)] = asked
        return point

    def _tell(self, point: Point, records: Sequence[TrialRecord], asked: optuna.Trial | None) -> None:
        assert self._study is not None
        metric, objectives = self._sweep.metric, self._sweep.objectives
        finished = [record for record in records if record.status == "finished"]
        values = [_mean([record.result(name) for record in finished]) for name in objectives]
        curves = [value for record in records if (value := record.at(len(record.curve), metric)) is not None]
        state, given = optuna.trial.TrialState.FAIL, None
        readings: dict[int, float] = {}
        if all(math.isfinite(value) for value in values):
            state, given = optuna.trial.TrialState.COMPLETE, values
        elif curves and len(objectives) == 1:
            state = optuna.trial.TrialState.PRUNED
            readings = {max(len(record.curve) for record in records): fmean(curves)}
        if asked is not None:
            for number, value in readings.items():
                asked.report(value, number)
            self._study.tell(asked, given, state)
            return
        space = self._sweep.space
        inside = [key for key in ordered(space) if active(space[key], point) and space[key].allows(point.get(key))]
        self._study.add_trial(
            optuna.trial.create_trial(
                state=state,
                values=given,
                params={key: category(space[key], point[key]) if space[key].listed else point[key] for key in inside},
                distributions={key: distribution(space[key]) for key in inside},
                intermediate_values=readings,
            )
        )

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the trials' own files tell everything at the next start."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see `save`."""


class Listed(Searcher):
    """Trials that are known beforehand, in their order."""

    def __init__(self, trials: Sequence[Trial], settle: SettleTrial) -> None:
        super().__init__()
        self._trials, self._settle = list(trials), settle
        self.exhausted = False  # nothing is left to begin
        self._running: dict[str, Trial] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # Ray's lacks FINISHED
        if not self._trials:
            self.exhausted = True
            return str(Searcher.FINISHED)
        self._running[trial_id] = self._trials.pop(0)
        return {"trial": asdict(self._running[trial_id]), "ended": False}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._settle(self._running.pop(trial_id), error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: see `Points.save`."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


def _study(sweep: Sweep) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    lowest, highest = optuna.study.StudyDirection.MINIMIZE, optuna.study.StudyDirection.MAXIMIZE
    best = highest if sweep.mode == "max" else lowest
    directions = [lowest if name == LATENCY else best for name in sweep.objectives]
    sampler = optuna.samplers.TPESampler(seed=sweep.searcher.seed, constant_liar=True)
    return optuna.create_study(directions=directions, sampler=sampler)


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return fmean(known) if known else math.nan

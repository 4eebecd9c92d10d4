"""Schema of a sweep file, and the trials that follow from it.

    experiment: ../small_data.yaml
    space:
      model.reg_max: {choice: [8, 16, 32, 64]}
      loss.ddf: {uniform: [0, 5], when: {model.regression: fdr}}
    trials: 24

A trial is one training: a point of the space and a seed. Its id is a hash of both, so a sweep that is started again finds it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from pipeline.config import ConfigError, Experiment, FolderName, Location, Tracking, WeightsLocation
from pipeline.config_files import check, dump, with_values
from pipeline.config_keys import Config
from pipeline.evaluation.coco_metrics import NUMBERS
from pipeline.training.schedule import BASE_BATCH_SIZE, evaluations_without_data
from pipeline.tuning.space import Domain, Point, canonical_text

LATENCY = "latency"  # milliseconds per image, measured when a trial ends; lower is better
UNCERTAINTY = ("edges/interval_score", "edges/width_error")  # see `LayerDiagnostics`
LOWER_IS_BETTER = (LATENCY, *UNCERTAINTY)
OBJECTIVES = (*NUMBERS, *UNCERTAINTY, LATENCY)
# Each phase has its own range of seeds, counted from the experiment's seed, so that no seed is used in two phases.
SEEDS_PER_PHASE = 1000
Phase = Literal["search", "replicate", "confirm"]
PHASES: tuple[Phase, ...] = ("search", "replicate", "confirm")


class Scheduler(Config):
    """Early stopping of trials."""

    kind: Literal["asha", "hyperband", "median", "none"] = "asha"
    reduction: Annotated[float, Field(gt=1)] = 3  # one trial in so many continues at each rung
    grace: PositiveInt = 1  # evaluations before a trial may be stopped


class Searcher(Config):
    """Source of the points to try."""

    kind: Literal["optuna", "random", "grid"] = "optuna"
    objectives: tuple[str, ...] = ()  # default: the metric alone; [AP, latency] looks for trade-offs
    seed: NonNegativeInt = 0


class Confirm(Config):
    """Confirmation: the best points of the search, trained again at full length with fresh seeds."""

    top: NonNegativeInt = 3
    seeds: PositiveInt = 3


class Sweep(Config):
    """A sweep file after `pipeline.tuning.load`: its paths are absolute, and `base` is filled in."""

    name: FolderName | None = None  # folder and parent run; default: the file's name
    storage: Location = Field(default="runs", validate_default=True)  # folder or URI, reachable from every node
    experiment: str
    cluster: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)  # the experiment's values by dotted key, equal in all trials
    init: WeightsLocation | None = None  # pretrained detector that all trials start from; their heads may differ
    space: dict[str, Domain]
    metric: str = "AP"
    mode: Literal["max", "min"] = "max"
    trials: PositiveInt | None = None  # points of the search; each is trained `seeds_per_point` times
    hours: PositiveFloat | None = None  # no point begins after so long
    scheduler: Scheduler = Scheduler()
    searcher: Searcher = Searcher()
    max_concurrent_trials: PositiveInt | None = None  # default: as many as fit
    workers_per_trial: PositiveInt = 1
    cpus_per_worker: NonNegativeFloat | None = None  # default: as in the cluster file
    gpus_per_worker: NonNegativeFloat | None = None  # 0.5 lets two workers share a GPU
    seeds_per_point: Annotated[int, Field(ge=1, le=SEEDS_PER_PHASE)] = 1
    replicates: Annotated[int, Field(ge=0, le=SEEDS_PER_PHASE)] = (
        3  # trainings of the unchanged experiment: they show the noise
    )
    confirm: Confirm = Confirm()
    tracking: Tracking | None = None  # default: the experiment's own
    # The experiment's file with `set` applied; filled in by the loader, never written by the user.
    base: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_a_goal_and_a_budget(self) -> Self:
        problems = [*_budget_problems(self), *_objective_problems(self), *_resource_problems(self)]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def objectives(self) -> tuple[str, ...]:
        """One or two metrics that the searcher optimizes."""
        return self.searcher.objectives or (self.metric,)


# Trials


@dataclass(frozen=True)
class Trial:
    """One training: a point and a seed."""

    index: int  # position in its phase
    phase: Phase
    point: Point
    seed: int

    @property
    def id(self) -> str:
        """Identifier of this training, equal in every start of the sweep."""
        content = canonical_text([self.phase, self.seed, self.point])
        return f"{self.phase}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"


def search_trials(sweep: Sweep, point: Point, first_index: int = 0) -> list[Trial]:
    """Trials of one point of the search, one per seed."""
    return _repeated(sweep, "search", [point], sweep.seeds_per_point, first_index)


def replicate_trials(sweep: Sweep) -> list[Trial]:
    """Trials of the unchanged experiment with fresh seeds. They measure the noise, so they must not be stopped early."""
    return _repeated(sweep, "replicate", [default_point(sweep)], sweep.replicates)


def confirm_trials(sweep: Sweep, points: Sequence[Point]) -> list[Trial]:
    """Trials that confirm points at full length; all points share the same fresh seeds."""
    return _repeated(sweep, "confirm", points, sweep.confirm.seeds)


def _repeated(sweep: Sweep, phase: Phase, points: Sequence[Point], count: int, first_index: int = 0) -> list[Trial]:
    first = int(sweep.base.get("seed") or 0) + SEEDS_PER_PHASE * PHASES.index(phase)
    runs = [(point, first + n) for point in points for n in range(count)]
    return [Trial(first_index + n, phase, point, seed) for n, (point, seed) in enumerate(runs)]


def experiment_of(sweep: Sweep, point: Point, seed: int) -> dict[str, Any]:
    """Experiment of a trial, for `check(Experiment, ...)`: the experiment's file, then `set`, then the point."""
    content = with_values(sweep.base, point)
    content["seed"] = seed
    if sweep.init is not None:
        content["init"] = sweep.init
    if sweep.tracking is not None:
        content["tracking"] = dump(sweep.tracking)
    return content


def tracking_of(sweep: Sweep) -> Tracking:
    """Tracking of the sweep and its trials: the sweep's own section, or the experiment's."""
    return sweep.tracking or Tracking(**(sweep.base.get("tracking") or {}))


def default_point(sweep: Sweep) -> Point:
    """The experiment's own values of the searched keys; None if a value follows from the length of the run."""
    experiment = check(Experiment, sweep.base, source=sweep.experiment)
    variant = experiment.model.variant
    recipe = {f"optimizer.{name}": value for name, value in vars(experiment.optimizer.config(variant, 1.0)).items()}
    recipe |= dict.fromkeys(("schedule.global_batch_size", "optimizer.base_batch_size"), BASE_BATCH_SIZE[variant])
    own = {key: _as_listed(sweep, key, value_at(dump(experiment), key)) for key in sweep.space}
    return {key: recipe.get(key) if value is None else value for key, value in own.items()}


def _as_listed(sweep: Sweep, key: str, value: Any) -> Any:
    """The candidate that means the same as a section with all its defaults, such as `{}`; other values as they are."""
    if isinstance(value, Mapping) and sweep.space[key].listed:
        for candidate in sweep.space[key].values:
            with suppress(ConfigError):  # a candidate may need values of other keys
                experiment = check(Experiment, with_values(sweep.base, {key: candidate}), source=sweep.experiment)
                if value_at(dump(experiment), key) == value:
                    return candidate
    return value


def value_at(content: Mapping[str, Any], dotted: str) -> Any:
    """Look up a dotted key; None if it is missing."""
    value: Any = content
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def evaluations_per_trial(sweep: Sweep) -> int | None:
    """Number of evaluations of a whole trial of the unchanged experiment; None if it depends on the data."""
    return evaluations_without_data(check(Experiment, sweep.base, source=sweep.experiment))


def rungs(sweep: Sweep, total: int) -> tuple[int, ...]:
    """Numbers of evaluations, below `total`, after which trials are compared and stopped."""
    if sweep.scheduler.kind == "none":
        return ()
    if sweep.scheduler.kind == "median":
        return tuple(range(sweep.scheduler.grace, total))
    numbers, rung = [], float(sweep.scheduler.grace)
    while rung < total:
        numbers.append(round(rung))
        rung *= sweep.scheduler.reduction
    return tuple(dict.fromkeys(numbers))


# Checks


def _budget_problems(sweep: Sweep) -> list[str]:
    problems = []
    if not sweep.space:
        problems.append("space: name at least one key with its candidate values")
    if sweep.trials is None and sweep.hours is None and sweep.searcher.kind != "grid":
        problems.append(
            "give trials or hours: the number of points to try, or the time limit; only a grid ends by itself"
        )
    return problems


def _objective_problems(sweep: Sweep) -> list[str]:
    problems = [
        f"{name!r} is not measured: choose from {', '.join(OBJECTIVES)}"
        for name in dict.fromkeys((sweep.metric, *sweep.searcher.objectives))
        if name not in OBJECTIVES
    ]
    objectives = sweep.objectives
    if sweep.metric == LATENCY:
        problems.append(
            "metric: latency is known only at the end of a trial: use AP, and searcher.objectives [AP, latency]"
        )
    if sweep.metric in UNCERTAINTY and sweep.mode == "max":
        problems.append(f"metric: {sweep.metric} is better when it is lower: add mode: min")
    if len(set(objectives)) != len(objectives) or len(objectives) > 2 or sweep.metric not in objectives:
        problems.append(
            f"searcher.objectives {list(objectives)}: give the metric ({sweep.metric}) and at most one more"
        )
    if len(objectives) > 1 and sweep.searcher.kind != "optuna":
        problems.append(f"two objectives need searcher.kind optuna, not {sweep.searcher.kind}")
    return problems


def _resource_problems(sweep: Sweep) -> list[str]:
    gpus = sweep.gpus_per_worker
    if gpus is not None and gpus > 1 and gpus % 1:
        return [f"gpus_per_worker ({gpus:g}): above 1, only whole GPUs can be assigned"]
    if not sweep.cpus_per_worker and not gpus and sweep.cpus_per_worker is not None:
        return ["cpus_per_worker and gpus_per_worker are both 0: a worker needs at least one of them"]
    return []

"""What a sweep file says, and the trials that follow from it.

    experiment: ../small_data.yaml
    space:
      model.reg_max: {choice: [8, 16, 32, 64]}
      loss.ddf: {uniform: [0, 5], when: {model.regression: fdr}}
    trials: 24

A trial is one training: a point of the space and a seed. It is known by what it is, so the same sweep started again finds it.
"""

import hashlib
from collections.abc import Mapping, Sequence
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

from pipeline.config import Config, Experiment, FolderName, Location, Tracking
from pipeline.config_files import check, dump, with_values
from pipeline.evaluation.coco_metrics import NUMBERS
from pipeline.training.schedule import BASE_BATCH_SIZE
from pipeline.tuning.space import Domain, Point, as_text

LATENCY = "latency"  # of one image in milliseconds, measured when a trial ends; the lower the better
OBJECTIVES = (*NUMBERS, LATENCY)
# Seeds of the phases, counted from the experiment's own: none is used in two phases.
SEEDS_OF_A_PHASE = 1000
Phase = Literal["search", "replicate", "confirm"]
PHASES: tuple[Phase, ...] = ("search", "replicate", "confirm")


class Scheduler(Config):
    """Which trials are stopped before their end."""

    kind: Literal["asha", "hyperband", "median", "none"] = "asha"
    reduction: Annotated[float, Field(gt=1)] = 3  # one of so many goes on at each rung
    grace: PositiveInt = 1  # evaluations that every trial may have


class Searcher(Config):
    """Where points come from."""

    kind: Literal["optuna", "random", "grid"] = "optuna"
    objectives: tuple[str, ...] = ()  # the metric alone if left out; [AP, latency] looks for trade-offs
    seed: NonNegativeInt = 0


class Confirm(Config):
    """The points that looked best, trained again at full length with seeds that chose nothing."""

    top: NonNegativeInt = 3
    seeds: PositiveInt = 3


class Sweep(Config):
    """Paths stand in the file relative to it, and are absolute here. `pipeline.tuning.load` makes one."""

    name: FolderName | None = None  # of the folder and the parent run; the file's name if left out
    storage: Location = Field(default="runs", validate_default=True)  # folder or URI, reachable from every node
    experiment: str
    cluster: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)  # values of the experiment by dotted key, the same in all trials
    init: Location | None = None  # one pretrained detector that all trials start from, though their heads differ
    space: dict[str, Domain]
    metric: str = "AP"
    mode: Literal["max", "min"] = "max"
    trials: PositiveInt | None = None  # points of the search phase; each is trained `seeds_per_point` times
    hours: PositiveFloat | None = None  # no point is begun after so long
    scheduler: Scheduler = Scheduler()
    searcher: Searcher = Searcher()
    together: PositiveInt | None = None  # trials at once; as many as fit if left out
    workers_per_trial: PositiveInt = 1
    cpus_per_worker: NonNegativeFloat | None = None  # the cluster file's if left out
    gpus_per_worker: NonNegativeFloat | None = None  # 0.5 lets two workers share a GPU
    seeds_per_point: Annotated[int, Field(ge=1, le=SEEDS_OF_A_PHASE)] = 1
    replicates: Annotated[int, Field(ge=0, le=SEEDS_OF_A_PHASE)] = 3  # of the experiment as it is: they show the noise
    confirm: Confirm = Confirm()
    tracking: Tracking | None = None  # the experiment's own if left out
    base: dict[str, Any] = Field(
        default_factory=dict
    )  # the experiment's file with `set` applied: filled in, not written

    @model_validator(mode="after")
    def _says_what_to_look_for_and_how_long(self) -> Self:
        problems = [*_budget_problems(self), *_objective_problems(self), *_resource_problems(self)]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.searcher.objectives or (self.metric,)


# Trials


@dataclass(frozen=True)
class Trial:
    index: int  # within its phase
    phase: Phase
    point: Point
    seed: int

    @property
    def id(self) -> str:
        """The same for the same training in every start of the sweep."""
        content = as_text([self.phase, self.seed, self.point])
        return f"{self.phase}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"


def search_trials(sweep: Sweep, point: Point, first_index: int = 0) -> list[Trial]:
    """The trainings of one searched point."""
    return _repeated(sweep, "search", [point], sweep.seeds_per_point, first_index)


def replicate_trials(sweep: Sweep) -> list[Trial]:
    """The experiment as it is, with other seeds: what chance alone does to the metric. They must not be stopped early."""
    return _repeated(sweep, "replicate", [default_point(sweep)], sweep.replicates)


def confirm_trials(sweep: Sweep, points: Sequence[Point]) -> list[Trial]:
    """Points trained again at full length, all with the same fresh seeds."""
    return _repeated(sweep, "confirm", points, sweep.confirm.seeds)


def _repeated(sweep: Sweep, phase: Phase, points: Sequence[Point], count: int, first_index: int = 0) -> list[Trial]:
    first = int(sweep.base.get("seed") or 0) + SEEDS_OF_A_PHASE * PHASES.index(phase)
    runs = [(point, first + n) for point in points for n in range(count)]
    return [Trial(first_index + n, phase, point, seed) for n, (point, seed) in enumerate(runs)]


def experiment_of(sweep: Sweep, point: Point, seed: int) -> dict[str, Any]:
    """What a trial trains, for `check(Experiment, ...)`: the experiment's file, then `set`, then the point."""
    content = with_values(sweep.base, point)
    content["seed"] = seed
    if sweep.init is not None:
        content["init"] = sweep.init
    if sweep.tracking is not None:
        content["tracking"] = dump(sweep.tracking)
    return content


def tracking_of(sweep: Sweep) -> Tracking:
    """Where the sweep and its trials are recorded: the sweep's own section, else the experiment's."""
    return sweep.tracking or Tracking(**(sweep.base.get("tracking") or {}))


def default_point(sweep: Sweep) -> Point:
    """The experiment's own values of the searched keys; None where a value follows from the length of the run."""
    experiment = check(Experiment, sweep.base, source=sweep.experiment)
    variant = experiment.model.variant
    recipe = {f"optimizer.{name}": value for name, value in vars(experiment.optimizer.config(variant, 1.0)).items()}
    recipe |= dict.fromkeys(("schedule.global_batch_size", "optimizer.base_batch_size"), BASE_BATCH_SIZE[variant])
    own = {key: value_at(dump(experiment), key) for key in sweep.space}
    return {key: recipe.get(key) if value is None else value for key, value in own.items()}


def value_at(content: Mapping[str, Any], dotted: str) -> Any:
    """None where there is none."""
    value: Any = content
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def evaluations(experiment: Experiment) -> int | None:
    """Of a whole trial, where the config alone tells."""
    schedule, evaluation = experiment.schedule, experiment.evaluation
    if schedule.epochs and not evaluation.every_steps:
        return -(-schedule.epochs // evaluation.every_epochs)
    if schedule.steps and evaluation.every_steps:
        return -(-schedule.steps // evaluation.every_steps)
    return None


def evaluations_of(sweep: Sweep) -> int | None:
    """Of a whole trial of the experiment as it is."""
    return evaluations(check(Experiment, sweep.base, source=sweep.experiment))


def rungs(sweep: Sweep, total: int) -> tuple[int, ...]:
    """Evaluations after which trials are compared and stopped, out of `total`."""
    if sweep.scheduler.kind == "none":
        return ()
    if sweep.scheduler.kind == "median":
        return tuple(range(sweep.scheduler.grace, total))
    found, at = [], float(sweep.scheduler.grace)
    while at < total:
        found.append(round(at))
        at *= sweep.scheduler.reduction
    return tuple(dict.fromkeys(found))


# Checks


def _budget_problems(sweep: Sweep) -> list[str]:
    problems = []
    if not sweep.space:
        problems.append("space: name at least one key with its candidates")
    if sweep.trials is None and sweep.hours is None and sweep.searcher.kind != "grid":
        problems.append("give trials or hours: how many points to try, or for how long; a grid alone ends by itself")
    return problems


def _objective_problems(sweep: Sweep) -> list[str]:
    problems = [
        f"{name!r} is not measured: choose among {', '.join(OBJECTIVES)}"
        for name in dict.fromkeys((sweep.metric, *sweep.searcher.objectives))
        if name not in OBJECTIVES
    ]
    objectives = sweep.objectives
    if sweep.metric == LATENCY:
        problems.append("metric: latency is known at the end of a trial only: take AP, and objectives [AP, latency]")
    if len(set(objectives)) != len(objectives) or len(objectives) > 2 or sweep.metric not in objectives:
        problems.append(
            f"searcher.objectives {list(objectives)}: name the metric ({sweep.metric}), and at most one more"
        )
    if len(objectives) > 1 and sweep.searcher.kind != "optuna":
        problems.append(f"two objectives need searcher optuna, not {sweep.searcher.kind}")
    return problems


def _resource_problems(sweep: Sweep) -> list[str]:
    gpus = sweep.gpus_per_worker
    if gpus is not None and gpus > 1 and gpus % 1:
        return [f"gpus_per_worker ({gpus:g}): above one only whole GPUs can be given"]
    if not sweep.cpus_per_worker and not gpus and sweep.cpus_per_worker is not None:
        return ["a worker needs something: give cpus_per_worker or gpus_per_worker"]
    return []

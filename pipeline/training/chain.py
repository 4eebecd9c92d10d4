"""Chain of training runs, each initialised with the best weights of the one before: pretrain, then fine-tune.

One MLflow run is the parent of all stages. Given again, the same chain skips the stages that are finished.
"""

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from pipeline import storage
from pipeline.config import (
    Cluster,
    ConfigError,
    Experiment,
    FolderName,
    Location,
    ModelAlias,
    ModelName,
    Tracking,
)
from pipeline.config_files import check, dump, flatten, read_yaml, with_values
from pipeline.config_keys import Config
from pipeline.data.shards.manifest import MANIFEST_NAME
from pipeline.ray_job import relative_problems, submitted_job
from pipeline.tracking.delivery import UndeliveredError
from pipeline.tracking.settings import TrackingSettings
from pipeline.tracking.tracker import Tracker
from pipeline.training.context import resolve_data
from pipeline.wording import plural

SOURCE = "jobs/pretrain_finetune.py"
RUN_ID_TIMEOUT_S = 30.0  # for MLflow to create the parent run, whose id the stages record


class ChainStage(Config):
    """One training run of a chain, as written in the file."""

    name: FolderName  # the run is called CHAIN-STAGE
    prepare: tuple[str, ...] = ()  # arguments of `dfine prepare`, one line for each shard set that may be missing
    experiment: str  # file, relative to the chain's
    set: dict[str, Any] = Field(default_factory=dict)  # overrides of the experiment, by dotted key
    cluster: str | Cluster | None = None  # file, relative to the chain's, or its values; default: the command's
    registered_model_name: ModelName | None = None  # registers the best weights under this name
    alias: ModelAlias | None = None  # alias of the registered version


class Chain(Config):
    """Chain file."""

    name: FolderName
    storage: Location = Field(default="runs", validate_default=True)
    tracking: Tracking = Tracking()
    stages: tuple[ChainStage, ...]

    @model_validator(mode="after")
    def _stages_have_distinct_names(self) -> Self:
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) != len(names):
            raise ValueError(
                f"stages: {len(names)} named {', '.join(names) or '-'}; give at least one, with distinct names"
            )
        return self


@dataclass(frozen=True)
class ResolvedStage:
    """A stage with its experiment and cluster, loaded and checked."""

    stage: ChainStage
    experiment: Experiment
    cluster: Cluster | None  # None: this process, where one is enough
    missing: tuple[tuple[str, ...], ...]  # arguments of `dfine prepare` for shard sets that do not exist yet


def load_chain(
    path: str | Path, overrides: dict[str, Any], cluster: Cluster | None
) -> tuple[Chain, list[ResolvedStage]]:
    """Load a chain file, and the experiment and cluster of every stage.

    Args:
        overrides: values of single stages, `{"pretrain.schedule.epochs": 2}`, or of the chain, `{"storage": "s3://bucket/runs"}`.
        cluster: default for stages without a cluster of their own; None: this process, where one is enough.

    Raises:
        ConfigError: with every problem of the chain, its experiments and its clusters.
    """
    # 1. The chain itself; overrides that begin with a stage's name belong to that stage.
    content = read_yaml(path)
    content.setdefault("name", Path(path).stem)
    content |= {key: value for key, value in overrides.items() if key in Chain.model_fields}
    chain = check(Chain, content, source=str(path))
    rest = {key: value for key, value in overrides.items() if key not in Chain.model_fields}
    known = tuple(stage.name for stage in chain.stages)
    problems = [
        f"--set {key}: begin with a stage, {' or '.join(known)}" for key in rest if key.split(".")[0] not in known
    ]
    steps = []
    for number, stage in enumerate(chain.stages):
        own = {key.partition(".")[2]: value for key, value in rest.items() if key.split(".")[0] == stage.name}
        try:
            steps.append(_step(chain, number, Path(path).parent, own, cluster))
        except ConfigError as error:
            problems.append(f"{stage.name}: {error}")
    if problems:
        raise ConfigError("\n".join([f"{path}: {plural(len(problems), 'problem')}", *problems]))
    return chain, steps


def _step(chain: Chain, number: int, folder: Path, overrides: dict[str, Any], cluster: Cluster | None) -> ResolvedStage:
    # The chain gives every run its name, storage and tracking, and all but the first their initial weights.
    stage = chain.stages[number]
    run = f"{chain.name}-{stage.name}"
    fixed: dict[str, Any] = {"name": run, "storage": chain.storage, "tracking": dump(chain.tracking)}
    fixed["tracking"]["tags"] |= {"chain": chain.name, "stage": stage.name}
    fixed["tracking"] |= {"registered_model_name": stage.registered_model_name, "alias": stage.alias}
    if number:
        fixed["init"] = storage.join(chain.storage, f"{chain.name}-{chain.stages[number - 1].name}")
    if taken := sorted(fixed.keys() & {key.split(".")[0] for key in stage.set | overrides}):
        raise ConfigError(f"{', '.join(taken)}: set by the chain itself")
    content = read_yaml(folder / stage.experiment) | fixed
    experiment = check(Experiment, with_values(content, stage.set | overrides), source=stage.experiment)
    where = (
        check(Cluster, read_yaml(folder / stage.cluster), source=stage.cluster)
        if isinstance(stage.cluster, str)
        else None
    )
    if problems := relative_problems(("prepare: --out", _out(line)) for line in stage.prepare):
        raise ConfigError("\n".join(problems))
    missing = tuple(tuple(_words(line)) for line in stage.prepare if not _is_there(_out(line)))
    return ResolvedStage(
        stage, experiment, where or (stage.cluster if isinstance(stage.cluster, Cluster) else cluster), missing
    )


def _out(line: str) -> str:
    words = _words(line)
    if "--out" not in words[:-1]:
        raise ConfigError(f"prepare: {line!r} does not say --out")
    return words[words.index("--out") + 1]


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise ConfigError(f"prepare: {line!r}: {error}") from None


def _is_there(folder: str) -> bool:
    return storage.exists(storage.join(folder, MANIFEST_NAME))


def run_chain(chain: Chain, steps: Sequence[ResolvedStage], prepare: Callable[[list[str]], None]) -> str:
    """Run the stages that are not finished, and return a summary.

    Args:
        prepare: main function of `dfine prepare`.
    """
    from pipeline.training import run_dir  # imports PyTorch, which reading a chain does without
    from pipeline.training.run_description import NOTE
    from pipeline.training.sigterm import sigterm_kills
    from pipeline.training.stop_request import status_after

    for step in steps:
        if not step.missing:
            resolve_data(step.experiment.data)  # a later stage must not fail after hours of the first
    folder = storage.join(chain.storage, chain.name)
    settings = TrackingSettings.resolve(
        chain.storage,
        experiment=chain.tracking.experiment,
        run_name=chain.name,
        uri=chain.tracking.uri,
    )
    settings = replace(settings, run_key=run_dir.get_or_make_key(folder))
    with Tracker(run_dir.outbox_folder(folder, settings.run_key or ""), settings) as tracker:
        job = {"ray.job": name} if (name := submitted_job()) else {}
        tracker.begin(flatten(dump(chain)), {"run_folder": folder, **job, **chain.tracking.tags}, (), SOURCE)
        parent_run_id = tracker.wait_for_run_id(RUN_ID_TIMEOUT_S)
        lines = []
        for number, step in enumerate(steps, start=1):
            print(f"stage {number} of {len(steps)}: {step.stage.name}", flush=True)
            try:
                with sigterm_kills(tracker):
                    numbers = _run_stage(step, prepare, settings.uri, parent_run_id)
            except BaseException as error:
                tracker.finish(status_after(error))
                raise
            lines.append(
                f"{step.stage.name}: {_summary_of(numbers)}, {storage.join(chain.storage, step.experiment.name or '')}"
            )
            tracker.metrics({f"{step.stage.name}/{key}": value for key, value in (numbers or {}).items()}, step=number)
        tracker.tags({NOTE: "\n\n".join([f"Chain of {len(steps)} stages", *lines])})
        tracker.finish("FINISHED")
    last = storage.join(chain.storage, steps[-1].experiment.name or "")
    return "\n".join([*lines, f"charts and images in MLflow: dfine ui {folder}", f"lineage: dfine lineage {last}"])


def _run_stage(
    step: ResolvedStage, prepare: Callable[[list[str]], None], tracking_uri: str, parent_run_id: str | None
) -> dict[str, float] | None:
    """Run one stage; return the 12 COCO numbers of its best weights."""
    from pipeline.training import run_dir  # PyTorch, which reading a chain does without
    from pipeline.training.in_process import is_enough
    from pipeline.training.launch import launch
    from pipeline.training.recording import deliver_run

    # 1. Prepare the shard sets that are missing.
    for arguments in step.missing:
        if not _is_there(arguments[arguments.index("--out") + 1]):
            prepare(list(arguments))
    if step.missing and step.cluster is None and is_enough(step.experiment):
        from pipeline.ray_cluster import stop_own_ray

        stop_own_ray()  # that preparing has started, and this training does without
    # 2. Skip a finished run, or train.
    experiment = step.experiment
    run = storage.join(experiment.storage, experiment.name or "")
    result = run_dir.result_of(run, experiment, resolve_data(experiment.data))
    if result is not None:
        print(f"{experiment.name} is finished: skipped", flush=True)
        try:
            deliver_run(run, tracking_uri)
        except UndeliveredError as error:
            print(error, flush=True)
        return result["numbers"]
    started_at = time.time()
    trained = launch(experiment, step.cluster, parent_run_id=parent_run_id)
    print(f"{trained.summary()}\n{experiment.name} took {(time.time() - started_at) / 60:.1f} min", flush=True)
    return trained.numbers


def _summary_of(numbers: dict[str, float] | None) -> str:
    return f"AP {numbers['AP']:.3f}, AP50 {numbers['AP50']:.3f}" if numbers else "not evaluated"

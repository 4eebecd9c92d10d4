"""The driver of a training: what it checks before the start, asks of the cluster, and returns."""

import math
import os
import shlex
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dfine_core.cpu import available_cores
from pipeline import storage
from pipeline.config import Cluster, ConfigError, Experiment
from pipeline.data.shards.reader import refuse_changed_files
from pipeline.ray_job import submitted_job
from pipeline.redaction import redact
from pipeline.tracking.delivery import missing_from_mlflow
from pipeline.tracking.settings import TrackingSettings
from pipeline.tracking.tracker import PATIENCE_AFTER_ERROR_S, Tracker
from pipeline.training import run_dir
from pipeline.training.activation import with_activation
from pipeline.training.context import ResolvedData, TrainJob, resolve_data
from pipeline.training.driver_lock import driver_lock
from pipeline.training.in_process import is_enough, train_in_process
from pipeline.training.init_weights import materialize_init, refuse_unreadable_weights
from pipeline.training.recording import deliver_run
from pipeline.training.schedule import Schedule, derive
from pipeline.training.sigterm import sigterm_kills
from pipeline.training.stop_request import TrainingStoppedError, status_after
from pipeline.training.teachers.checks import with_copied_teacher, with_teachers

if TYPE_CHECKING:  # a training in this process does without Ray
    from ray.train import UserCallback

    from pipeline.training.preflight import Request


@dataclass(frozen=True)
class TrainResult:
    """Result of a finished training."""

    run: str  # folder or URI
    step: int
    best_ap: float | None
    numbers: dict[str, float] | None  # COCO numbers of the best weights
    skipped_steps: int
    run_id: str | None  # in MLflow
    unrecorded: str | None = None  # what MLflow lacks, and the way out

    def summary(self) -> str:
        """Describe the result in a few lines."""
        lines = [f"finished at step {self.step}; {self.skipped_steps} non-finite steps were skipped"]
        if self.numbers is not None:
            lines.append(f"best weights: AP {self.numbers['AP']:.3f}, AP50 {self.numbers['AP50']:.3f}")
        lines += [
            f"checkpoints, reports and images: {self.run}",
            f"charts and images in MLflow: dfine ui {self.run}",
        ]
        return "\n".join([*lines, *([self.unrecorded] if self.unrecorded else [])])


def launch(
    experiment: Experiment,
    cluster: Cluster | None = None,
    *,
    resume: str | None = None,
    allow_changes: bool = False,
    profile_steps: int = 0,
    verify_data: bool = False,
    parent_run_id: str | None = None,
    callbacks: "Sequence[UserCallback]" = (),
) -> TrainResult:
    """Train, or continue: the same call resumes a run that was interrupted, or delivers to MLflow what a finished one left.

    Args:
        cluster: None trains in this process where one is enough, and elsewhere on the workers of an empty cluster file.
        resume: checkpoint of another run that this one continues.
        allow_changes: continue although the experiment or its data have changed since the run started.
        profile_steps: steps that rank 0 records with PyTorch's profiler.
        verify_data: read all shards before the start, and compare their SHA-256 with the manifest.
        parent_run_id: MLflow run that this one belongs to.
        callbacks: Ray Train callbacks; each evaluation is reported to them.

    Raises:
        UserError: the run cannot start, with every problem found; also an error that a worker met.
        TrainingStoppedError: a stop signal ended it after a step, with a checkpoint.
        RunFinishedError: the run is finished, and MLflow has everything.
        UndeliveredError: it is finished, and MLflow does not have everything.
        ray.train.TrainingFailedError: the workers failed more often than the cluster file allows.
    """
    launched_at = time.time()
    run = storage.join(experiment.storage, experiment.name or "run")

    # 1. Check on this machine everything that could fail later: data, tracking server, initial weights.
    resolved = resolve_data(experiment.data)
    for shards in resolved.shard_sets():
        refuse_changed_files(shards, contents=verify_data)
    tracking = TrackingSettings.resolve(
        experiment.storage,
        experiment=experiment.tracking.experiment,
        run_name=experiment.name or "run",
        uri=experiment.tracking.uri,
        parent_run_id=parent_run_id,
    )
    data = with_teachers(experiment, resolved, run, tracking.uri)
    refuse_unreadable_weights(experiment.init, resume, run)

    # 2. This process, or workers of Ray.
    request = None if cluster is None and is_enough(experiment) else _request(cluster or Cluster(), experiment)
    cluster = cluster or Cluster()
    with driver_lock(run):
        # 3. A new run, or an unfinished one with the same settings and data.
        try:
            start = run_dir.begin_or_continue(
                run, experiment, data, tracking_key=uuid.uuid4().hex, allow_changes=allow_changes
            )
        except run_dir.RunFinishedError as finished:
            return _deliver_rest(run, tracking, finished)

        if start.notice:
            print(start.notice, flush=True)

        # 4. Derive the schedule, and check the nodes.
        schedule = _schedule(experiment, data, request, start)
        if request is not None:
            _refuse_problems_on_nodes(request, run, data)
        tracking = replace(tracking, run_key=start.tracking_key)
        notes: list[str] = []
        experiment = with_copied_teacher(experiment, run, tracking.uri)
        if experiment.init:
            init = materialize_init(experiment.init, run, tracking.uri)
            experiment, notes = with_activation(experiment.model_copy(update={"init": init}))

        # 5. Hand everything to the workers.
        job = TrainJob(
            experiment=experiment,
            data=data,
            schedule=schedule,
            run=run,
            tracking=tracking,
            outbox_folder=run_dir.outbox_folder(run, start.tracking_key),
            resume=resume,
            threads=cluster.threads_per_worker or _threads(request),
            evaluation_resources={"CPU": cluster.evaluation_cpus, "GPU": cluster.evaluation_gpus},
            profile_steps=profile_steps,
            ray_job=submitted_job(),
            command=_command(),
            launched_at=launched_at,
        )
        where = "in this process, on the CPU" if request is None else f"{request}"
        for text in (
            f"run {experiment.name} in {run}",
            where,
            *data.lines(),
            *schedule.lines(evaluates=data.val is not None),
            *notes,
            *_warnings(job, request),
        ):
            print(text, flush=True)
        return _train(job, cluster, request, tracking, callbacks)


def _command() -> str:
    """Command of this process as a person would type it."""
    program = Path(sys.argv[0])
    words = ["dfine", program.stem] if program.suffix == ".py" else [program.name]  # `python -m jobs.train`
    return redact(shlex.join([*words, *sys.argv[1:]]))


def _request(cluster: Cluster, experiment: Experiment) -> "Request":
    """Connect to Ray, and size the request."""
    from pipeline.ray_cluster import start_ray
    from pipeline.training.preflight import request_for

    if cluster.address:
        os.environ["RAY_ADDRESS"] = cluster.address
    start_ray()
    decodes, evaluates = experiment.data.decode_in == "task", experiment.evaluation.asynchronous
    return request_for(cluster, decodes=decodes, asynchronous_evaluation=evaluates)


def _refuse_problems_on_nodes(request: "Request", run: str, data: ResolvedData) -> None:
    from pipeline.training.preflight import problems_on_nodes

    problems = problems_on_nodes(request, run, [shards.uri for shards in data.shard_sets()])
    if problems:
        raise ConfigError("\n  ".join(["the cluster cannot run this:", *problems]))


def _threads(request: "Request | None") -> int | None:
    """PyTorch threads of a worker on the CPU, an equal share of the cores; None on GPUs leaves it to PyTorch.

    In this process OMP_NUM_THREADS sets them. Ray sets that variable for its own processes, also for that of a submitted job.
    """
    if request is None:
        given = os.environ.get("OMP_NUM_THREADS", "")
        return int(given) if given.isdecimal() and int(given) else available_cores()
    return None if request.gpus else max(1, available_cores() // request.most)


def _warnings(job: TrainJob, request: "Request | None") -> list[str]:
    """What makes GPUs wait in every step; nothing on the CPU."""
    if request is None or not request.gpus:
        return []
    from pipeline.training.budget import launch_cost  # here: it builds the model, to count its kernels

    train = job.data.train
    config = job.experiment.model.config(len(train.categories), job.experiment.loss)
    boxes = round(train.statistics.boxes_per_image.mean)
    _, warning = launch_cost(config, job.schedule, request.most, boxes=boxes)
    return [warning] if warning else []


def _schedule(
    experiment: Experiment, data: ResolvedData, request: "Request | None", start: run_dir.RunStart
) -> Schedule:
    """Schedule of the run; the same for every number of workers that the request allows.

    Raises:
        ConfigError: the largest number cannot share the global batch, batch statistics would need even shares, or parts would be
            compiled on a CPU.
    """
    least, most = (1, 1) if request is None else (request.least, request.most)
    images = data.train.images_in_epoch
    schedule = derive(experiment, images=images, workers=most, micro_batch_size=start.micro_batch_size)
    if experiment.numerics.compile in ("detector", "step") and experiment.teacher.in_use:
        raise ConfigError("numerics.compile: a teacher reads the detector's maps outside its graph: write off")
    if experiment.numerics.compile in ("detector", "step") and data.train.weighted:
        raise ConfigError(
            f"numerics.compile: labels of {data.train.title} are of unequal worth (--tile or --pseudo), which graphs do not know:"
            " write off or auto"
        )
    if experiment.numerics.compile in ("detector", "step") and (request is None or not request.gpus):
        raise ConfigError(
            "numerics.compile: on a CPU, TorchInductor computes wrong gradients of the encoder (torch 2.14): write off,"
            " or train on GPUs"
        )
    uneven = [n for n in range(least, most + 1) if schedule.micro_batches % n]
    if uneven and experiment.numerics.sync_batch_norm:
        raise ConfigError(
            f"numerics.sync_batch_norm needs equal shares, and {schedule.micro_batches} micro-batches of a step cannot be shared"
            f" evenly by {' or '.join(map(str, uneven))} workers: choose other `workers`, or schedule.micro_batch_size"
        )
    return schedule


def _train(
    job: TrainJob,
    cluster: Cluster,
    request: "Request | None",
    tracking: TrackingSettings,
    callbacks: "Sequence[UserCallback]",
) -> TrainResult:
    assert job.outbox_folder is not None
    # On standby: where a worker sees the same outbox, it uploads.
    tracker = Tracker(job.outbox_folder, tracking, standby=True)
    try:
        with sigterm_kills(tracker):
            if request is None:
                value = train_in_process(job)
            else:
                from pipeline.training.on_ray import train_on_ray

                value = train_on_ray(job, cluster, request, callbacks)
            if saved := value.get("stopped"):
                raise TrainingStoppedError(
                    f"stopped at step {value['step']}, saved in {saved}; to continue: {job.command}"
                )
    except BaseException as error:
        _record_end(tracker, job.run, error)
        if isinstance(error, SystemExit):  # Ray Train exits with 0 after Ctrl-C
            raise KeyboardInterrupt from None
        raise
    finally:
        tracker.stop()
    return TrainResult(
        run=job.run,
        step=value["step"],
        best_ap=value["best_ap"],
        numbers=value.get("numbers"),
        skipped_steps=value["skipped_steps"],
        run_id=value.get("run_id"),
        unrecorded=value.get("unrecorded"),
    )


def _record_end(tracker: Tracker, run: str, error: BaseException) -> None:
    """Set the status in MLflow; if the run is started again, it continues in the same MLflow run."""
    status = status_after(error)
    try:
        if not run_dir.is_finished(run):
            tracker.finish(status)
        limit = math.inf if status == "FAILED" else PATIENCE_AFTER_ERROR_S
        left = tracker.deliver(PATIENCE_AFTER_ERROR_S, limit=limit)
        if text := missing_from_mlflow(left, [], run):
            print(text, flush=True)
    except (OSError, ValueError) as problem:
        print(f"the end of the run could not be recorded: {problem}", flush=True)


def _deliver_rest(run: str, tracking: TrackingSettings, finished: run_dir.RunFinishedError) -> TrainResult:
    """Deliver to MLflow what a finished run has left.

    Raises:
        RunFinishedError: nothing was left.
        UndeliveredError: something is still left.
    """
    delivery = deliver_run(run, tracking.uri)
    if not delivery.delivered:
        raise finished
    print(f"the run was finished; MLflow has now the rest of it, {delivery.delivered} events", flush=True)
    result = finished.result
    return TrainResult(
        run=run,
        step=result["step"],
        best_ap=result.get("best_ap"),
        numbers=result.get("numbers"),
        skipped_steps=result.get("skipped_steps", 0),
        run_id=None,
    )

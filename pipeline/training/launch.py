"""The driver of a training: what it checks before the start, asks of the cluster, and returns."""

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ray.train import (
    ControllerError,
    FailureConfig,
    LoggingConfig,
    Result,
    RunConfig,
    ScalingConfig,
    UserCallback,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline import storage
from pipeline.config import Cluster, ConfigError, Experiment
from pipeline.data.shards.reader import refuse_changed_files
from pipeline.errors import UserError
from pipeline.ray_cluster import start_ray
from pipeline.ray_job import submitted_job
from pipeline.tracking.settings import TrackingSettings
from pipeline.tracking.tracker import Tracker
from pipeline.training import run_dir
from pipeline.training.context import ResolvedData, TrainJob, resolve_data
from pipeline.training.heartbeat import ProgressMonitor, start_progress_board
from pipeline.training.init_weights import materialize_init, refuse_unreadable_weights
from pipeline.training.preflight import Request, cpu_threads, problems_on_nodes, request_for
from pipeline.training.schedule import Schedule, derive
from pipeline.training.worker import train_worker

FAILED_STARTS = 3  # of the workers, repeated without a step in between; the next one ends the run
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"  # Ray Train's controller inherits it from this process


@dataclass(frozen=True)
class TrainResult:
    """Result of a finished training."""

    run: str  # folder or URI
    step: int
    best_ap: float | None
    numbers: dict[str, float] | None  # COCO numbers of the best weights
    skipped_steps: int
    tracking: TrackingSettings
    run_id: str | None  # in MLflow

    def summary(self) -> str:
        """Describe the result in a few lines."""
        lines = [f"finished at step {self.step}; {self.skipped_steps} non-finite steps were skipped"]
        if self.numbers is not None:
            lines.append(f"best weights: AP {self.numbers['AP']:.3f}, AP50 {self.numbers['AP50']:.3f}")
        lines += [
            f"checkpoints, reports and images: {self.run}",
            f"MLflow: mlflow ui --backend-store-uri {self.tracking.shown_uri}"
            if self.tracking.uri.startswith("sqlite")
            else f"MLflow: {self.tracking.shown_uri}",
        ]
        return "\n".join(lines)


def launch(
    experiment: Experiment,
    cluster: Cluster,
    *,
    resume: str | None = None,
    allow_changes: bool = False,
    profile_steps: int = 0,
    parent_run_id: str | None = None,
    callbacks: Sequence[UserCallback] = (),
) -> TrainResult:
    """Train, or continue: the same call resumes a run that was interrupted.

    Args:
        resume: checkpoint of another run that this one continues.
        allow_changes: continue although the experiment or its data have changed since the run started.
        profile_steps: steps that rank 0 records with PyTorch's profiler.
        parent_run_id: MLflow run that this one belongs to.
        callbacks: Ray Train callbacks; each evaluation is reported to them.

    Raises:
        UserError: the run cannot start, with every problem found; also an error that a worker met.
        ray.train.TrainingFailedError: the workers failed more often than the cluster file allows.
    """
    launched_at = time.time()
    run = storage.join(experiment.storage, experiment.name or "run")

    # 1. Check on this machine everything that could fail later: data, tracking server, initial weights.
    data = resolve_data(experiment.data)
    for shards in filter(None, (data.train, data.val)):
        refuse_changed_files(shards)
    tracking = TrackingSettings.resolve(
        experiment.storage,
        experiment=experiment.tracking.experiment,
        run_name=experiment.name or "run",
        uri=experiment.tracking.uri,
        parent_run_id=parent_run_id,
    )
    refuse_unreadable_weights(experiment.init, resume)

    # 2. Connect to Ray, and size the request.
    if cluster.address:
        os.environ["RAY_ADDRESS"] = cluster.address
    start_ray(dashboard=True)
    request = request_for(
        cluster, decodes=experiment.data.decode_in == "task", asynchronous_evaluation=experiment.evaluation.asynchronous
    )
    with run_dir.driver_lock(run):
        # 3. A new run, or an unfinished one with the same settings and data.
        start = run_dir.begin_or_continue(
            run, experiment, data, tracking_key=uuid.uuid4().hex, allow_changes=allow_changes
        )

        # 4. Derive the schedule, and check the nodes.
        schedule = _schedule(experiment, data, request, start)
        problems = problems_on_nodes(request, run, [shards.uri for shards in (data.train, data.val) if shards])
        if problems:
            raise ConfigError("\n  ".join(["the cluster cannot run this:", *problems]))
        tracking = replace(tracking, run_key=start.tracking_key)
        if experiment.init:
            init = materialize_init(experiment.init, run, tracking.uri)
            experiment = experiment.model_copy(update={"init": init})

        # 5. Hand everything to the workers.
        job = TrainJob(
            experiment=experiment,
            data=data,
            schedule=schedule,
            run=run,
            tracking=tracking,
            outbox_folder=run_dir.outbox_folder(run, start.tracking_key),
            resume=resume,
            threads=cluster.threads_per_worker or cpu_threads(request),
            evaluation_resources={"CPU": cluster.evaluation_cpus, "GPU": cluster.evaluation_gpus},
            profile_steps=profile_steps,
            ray_job=submitted_job(),
            launched_at=launched_at,
        )
        for text in (f"run {experiment.name} in {run}", f"{request}", *schedule.lines(), *_warnings(job, request)):
            print(text, flush=True)
        return _train(job, cluster, request, tracking, callbacks)


def _warnings(job: TrainJob, request: Request) -> list[str]:
    """What makes GPUs wait in every step; nothing on the CPU."""
    if not request.gpus:
        return []
    from pipeline.training.budget import launch_cost  # here: it builds the model, to count its kernels

    train = job.data.train.manifest
    config = job.experiment.model.config(len(train.categories), job.experiment.loss)
    boxes = round(train.statistics.boxes_per_image.mean)
    _, warning = launch_cost(config, job.schedule, request.most, boxes=boxes)
    return [warning] if warning else []


def _schedule(experiment: Experiment, data: ResolvedData, request: Request, start: run_dir.RunStart) -> Schedule:
    """Schedule of the run; the same for every number of workers that the request allows.

    Raises:
        ConfigError: the largest number cannot share the global batch, or batch statistics would need even shares.
    """
    images = data.train.manifest.images
    schedule = derive(experiment, images=images, workers=request.most, micro_batch_size=start.micro_batch_size)
    uneven = [n for n in range(request.least, request.most + 1) if schedule.micro_batches % n]
    if uneven and experiment.numerics.sync_batch_norm:
        raise ConfigError(
            f"numerics.sync_batch_norm needs equal shares, and {schedule.micro_batches} micro-batches of a step cannot be shared"
            f" evenly by {' or '.join(map(str, uneven))} workers: choose other `workers`, or schedule.micro_batch_size"
        )
    return schedule


def _train(
    job: TrainJob,
    cluster: Cluster,
    request: Request,
    tracking: TrackingSettings,
    callbacks: Sequence[UserCallback],
) -> TrainResult:
    # Ray Train restarts failed workers; the board and the monitor outlive them.
    board = start_progress_board()
    os.environ[START_TIMEOUT] = str(cluster.start_timeout_s)
    name = job.experiment.name or "training"
    monitor = ProgressMonitor(board, name=name, steps=job.schedule.steps, timeout_s=cluster.heartbeat_timeout_s)
    with monitor, _sigterm_interrupts():
        try:
            result = fit_with_restarts(lambda: _trainer(job, cluster, request, board, callbacks), lambda: monitor.step)
        except BaseException as error:
            _finish_tracking(job, tracking, "FAILED" if isinstance(error, Exception) else "KILLED")
            if (mistake := user_error_of(error)) is not None:
                raise mistake from None
            raise
    value: dict[str, Any] = result.return_value
    return TrainResult(
        run=job.run,
        step=value["step"],
        best_ap=value["best_ap"],
        numbers=value.get("numbers"),
        skipped_steps=value["skipped_steps"],
        tracking=tracking,
        run_id=value.get("run_id"),
    )


def _trainer(
    job: TrainJob, cluster: Cluster, request: Request, board: Any, callbacks: Sequence[UserCallback]
) -> TorchTrainer:
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job, "board": board},
        torch_config=TorchConfig(
            backend="nccl" if request.gpus else "gloo", timeout_s=int(cluster.collective_timeout_s)
        ),
        scaling_config=ScalingConfig(
            num_workers=request.most if request.least == request.most else (request.least, request.most),
            use_gpu=request.gpus > 0,
            resources_per_worker=request.per_worker,
            placement_strategy=cluster.placement,
            accelerator_type=cluster.accelerator_type,
        ),
        run_config=RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),  # always a new name: Ray would silently resume an old one
            storage_path=storage.join(job.run, "ray"),
            failure_config=FailureConfig(
                max_failures=cluster.max_failures,
                controller_failure_limit=0,  # `fit_with_restarts` has a better limit
                max_preemption_failures=cluster.max_preemptions,
            ),
            callbacks=list(callbacks),
            logging_config=LoggingConfig(log_level="ERROR"),  # `ProgressMonitor` names a worker that hangs
        ),
    )


def fit_with_restarts(trainer: Callable[[], TorchTrainer], step: Callable[[], int]) -> Result:
    """Run a trainer, and a new one where the workers could not be started; each continues from the newest checkpoint.

    Ray Train counts failed starts over the whole run, and retries none that fails while the process group is set up. A long run
    on nodes that come and go would end by this count. Here a step in between starts the count anew.

    Args:
        trainer: makes a new trainer.
        step: steps that the run has reached.

    Raises:
        ControllerError: `FAILED_STARTS` more starts failed without a step in between.
        WorkerGroupError: a worker failed more often than the cluster file allows.
    """
    failures, reached = 0, step()
    while True:
        try:
            return trainer().fit()
        except ControllerError as error:
            failures = 1 if step() > reached else failures + 1
            reached = step()
            if failures > FAILED_STARTS:
                raise
            reason = (str(error.controller_failure).strip() or repr(error.controller_failure)).splitlines()[0]
            print(
                f"the workers did not start, {failures} of at most {FAILED_STARTS} times since step {reached}: {reason}",
                flush=True,
            )


def user_error_of(error: BaseException) -> UserError | None:
    """User error behind a failed training, if a worker met one."""
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    for failure in failures:
        inner = getattr(failure, "cause", failure)  # Ray wraps the exception of its task
        if isinstance(inner, UserError):
            return inner
    return None


def _finish_tracking(job: TrainJob, tracking: TrackingSettings, status: Any) -> None:
    """Set the final status in MLflow; if the run is started again, it continues in the same MLflow run."""
    assert job.outbox_folder is not None
    try:
        with Tracker(job.outbox_folder, tracking) as tracker:
            tracker.finish(status)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"the end of the run could not be recorded: {error}", flush=True)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Turn SIGTERM, which `ray job stop` sends, into KeyboardInterrupt: Ray Train answers it by stopping the workers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

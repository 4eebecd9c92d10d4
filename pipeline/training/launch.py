"""From an experiment to workers that train it: what is asked of the cluster, what is checked before, what is known after."""

import os
import signal
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline import storage
from pipeline.config import Cluster, ConfigError, Experiment
from pipeline.data.shards.manifest import load_shards
from pipeline.data.shards.reader import refuse_changed_files
from pipeline.errors import UserError
from pipeline.ray_cluster import start_ray
from pipeline.ray_job import submitted_job
from pipeline.tracking.settings import TrackingSettings
from pipeline.tracking.tracker import Tracker
from pipeline.training import run_dir
from pipeline.training.context import Job
from pipeline.training.heartbeat import Watch, start_mailbox
from pipeline.training.init_weights import pinned, refuse_unreadable_weights
from pipeline.training.preflight import Request, cpu_threads, problems_on_nodes, request_for
from pipeline.training.schedule import Schedule, derive
from pipeline.training.worker import train_worker

CONTROLLER_FAILURES = 3  # of Ray Train's own process, or starts of workers that came to nothing
START_TIMEOUT = (
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"  # read by Ray Train's controller, which gets it from this process
)


@dataclass(frozen=True)
class Outcome:
    run: str
    step: int
    best_ap: float | None
    numbers: dict[str, float] | None  # of the best weights
    skipped_steps: int
    tracking: TrackingSettings
    run_id: str | None

    def summary(self) -> str:
        lines = [f"finished at step {self.step}; {self.skipped_steps} steps were skipped as not finite"]
        if self.numbers is not None:
            lines.append(f"best weights: AP {self.numbers['AP']:.3f}, AP50 {self.numbers['AP50']:.3f}")
        lines += [
            f"checkpoints, reports and pictures: {self.run}",
            f"record: mlflow ui --backend-store-uri {self.tracking.shown_uri}"
            if self.tracking.uri.startswith("sqlite")
            else f"record: {self.tracking.shown_uri}",
        ]
        return "\n".join(lines)


def launch(
    experiment: Experiment,
    cluster: Cluster,
    *,
    resume: str | None = None,
    allow_changes: bool = False,
    parent_run_id: str | None = None,
    callbacks: Sequence[UserCallback] = (),
) -> Outcome:
    """Train, or go on training: the same call continues a run that was interrupted.

    Args:
        resume: checkpoint of another run that this one continues.
        allow_changes: continue although the experiment or its data differ from what the run began with.
        parent_run_id: MLflow run that this one is a part of.
        callbacks: of Ray Train; they hear of every evaluation.

    Raises:
        UserError: invalid input, with every problem found; also one that the workers met.
        ray.train.TrainingFailedError: the workers failed more often than the cluster file allows.
    """
    launched_at = time.time()
    shards = load_shards(experiment.data.train)
    val = load_shards(experiment.data.val) if experiment.data.val else None
    for given in filter(None, (shards, val)):
        refuse_changed_files(given)
    run = storage.absolute(storage.join(experiment.storage, experiment.name or "run"))
    experiment = experiment.model_copy(update={"storage": storage.absolute(experiment.storage)})
    tracking = TrackingSettings.resolve(
        experiment.storage,
        experiment=experiment.tracking.experiment,
        run_name=experiment.name or "run",
        uri=experiment.tracking.uri,
        parent_run_id=parent_run_id,
    )
    refuse_unreadable_weights(experiment.init, resume)
    if cluster.address:
        os.environ["RAY_ADDRESS"] = cluster.address
    start_ray(dashboard=True)
    request = request_for(
        cluster, decodes=experiment.data.decode_in == "task", evaluates_beside=experiment.evaluation.beside
    )
    with run_dir.claimed(run):
        began = run_dir.begin_or_continue(
            run, experiment, shards, val, tracking_key=uuid.uuid4().hex, allow_changes=allow_changes
        )
        schedules = [
            derive(
                experiment,
                images=shards.manifest.images,
                workers=n,
                micro_batch=began.micro_batch or request.micro_batch(experiment),
            )
            for n in range(request.least, request.most + 1)
        ]
        problems = problems_on_nodes(run, [s.uri for s in (shards, val) if s])
        if problems:
            raise ConfigError("\n  ".join(["the cluster cannot run this:", *problems]))
        tracking = replace(tracking, run_key=began.tracking_key)
        if experiment.init:
            experiment = experiment.model_copy(update={"init": pinned(experiment.init, run, tracking.uri)})
        job = Job(
            experiment=_with_absolute_data(experiment),
            run=run,
            tracking=tracking,
            tracking_folder=run_dir.queue_folder(run, began.tracking_key),
            micro_batch=schedules[-1].micro_batch,
            resume=storage.absolute(resume) if resume else None,
            threads=cluster.threads_per_worker or cpu_threads(request),
            evaluation_resources={"CPU": cluster.evaluation_cpus, "GPU": cluster.evaluation_gpus},
            ray_job=submitted_job(),
            launched_at=launched_at,
        )
        for text in (f"run {experiment.name} in {run}", f"{request}", *schedules[-1].lines()):
            print(text, flush=True)
        return _train(job, cluster, request, schedules[-1], callbacks)


def _train(
    job: Job, cluster: Cluster, request: Request, schedule: Schedule, callbacks: Sequence[UserCallback]
) -> Outcome:
    mailbox = start_mailbox()
    os.environ[START_TIMEOUT] = str(cluster.start_timeout_s)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job, "mailbox": mailbox},
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
            name=time.strftime("%Y%m%d-%H%M%S"),  # never one that was: Ray would resume it in silence
            storage_path=storage.join(job.run, "ray"),
            failure_config=FailureConfig(
                max_failures=cluster.max_failures,
                controller_failure_limit=CONTROLLER_FAILURES,
                max_preemption_failures=cluster.max_preemptions,
            ),
            callbacks=list(callbacks),
            logging_config=LoggingConfig(log_level="ERROR"),  # a worker that hangs is named by `Watch`
        ),
    )
    name = job.experiment.name or "training"
    with Watch(mailbox, name=name, steps=schedule.steps, silent_s=cluster.silent_s), _ended_by_sigterm():
        try:
            result = trainer.fit()
        except BaseException as error:
            _close_record(job, "FAILED" if isinstance(error, Exception) else "KILLED")
            if (mistake := user_error_of(error)) is not None:
                raise mistake from None
            raise
    value: dict[str, Any] = result.return_value
    return Outcome(
        run=job.run,
        step=value["step"],
        best_ap=value["best_ap"],
        numbers=value.get("numbers"),
        skipped_steps=value["skipped_steps"],
        tracking=job.tracking,  # type: ignore[arg-type]
        run_id=value.get("run_id"),
    )


def user_error_of(error: BaseException) -> UserError | None:
    """The mistake behind a failed training, if one of its workers met it."""
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    for failure in failures:
        inner = getattr(failure, "cause", failure)  # Ray's own error holds what its task raised
        if isinstance(inner, UserError):
            return inner
    return None


def _close_record(job: Job, status: Any) -> None:
    """Note in MLflow how it ended; the run goes on in the same record if it is started again."""
    try:
        with Tracker(job.tracking_folder, job.tracking) as tracker:  # type: ignore[arg-type]
            tracker.finish(status)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"the end of the run could not be recorded: {error}", flush=True)


class _ended_by_sigterm:
    """`ray job stop` sends SIGTERM: end as after Ctrl-C, which Ray Train answers by stopping its workers."""

    def __enter__(self) -> None:
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._interrupt)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    @staticmethod
    def _interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt


def _with_absolute_data(experiment: Experiment) -> Experiment:
    """Workers have another working directory."""
    data = experiment.data
    val = storage.absolute(data.val) if data.val else None
    absolute = data.model_copy(update={"train": storage.absolute(data.train), "val": val})
    return experiment.model_copy(update={"data": absolute})

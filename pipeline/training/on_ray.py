"""Training by Ray Train: workers on one machine or many, started again when one is lost."""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from ray.exceptions import RayActorError
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
from ray.train.torch import TorchTrainer

from pipeline import storage
from pipeline.config import Cluster
from pipeline.errors import DISK_FAULTS, UserError
from pipeline.ray_address import ClusterError
from pipeline.ray_cluster import lacks_dashboard
from pipeline.ray_internals import drop_placement_group_cleaner, keep_signal_handlers
from pipeline.training.context import TrainJob
from pipeline.training.heartbeat import ProgressMonitor, start_progress_board
from pipeline.training.preflight import Request, waits_for
from pipeline.training.rendezvous import LocalTorchConfig
from pipeline.training.stop_request import stop_signals
from pipeline.training.worker import train_worker

FAILED_STARTS = 3  # starts of the workers that are repeated without a step in between; the next failure ends the run
# Ray Train's controller inherits these from this process.
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
RESPONSE_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"  # for a worker whose process does not respond


def train_on_ray(
    job: TrainJob, cluster: Cluster, request: Request, callbacks: Sequence[UserCallback]
) -> dict[str, Any]:
    """Train on workers to the end or to a stop signal, and return the result of rank 0.

    Raises:
        UserError: one that a worker met.
        ray.train.TrainingFailedError: the workers failed more often than the cluster file allows.
    """
    # Ray Train restarts failed workers; the board and the monitor outlive them.
    board = start_progress_board()
    os.environ[START_TIMEOUT] = str(cluster.start_timeout_s)
    os.environ[RESPONSE_TIMEOUT] = str(cluster.collective_timeout_s)
    name = job.experiment.name or "training"
    with (
        ProgressMonitor(
            board,
            name=name,
            steps=job.schedule.steps,
            timeout_s=cluster.heartbeat_timeout_s,
            end_after_s=cluster.collective_timeout_s,
            waits_for=lambda started: waits_for(request, started=started),
        ) as monitor,
        stop_signals(monitor.request_stop),
    ):
        try:
            result = fit_with_restarts(lambda: _trainer(job, cluster, request, board, callbacks), lambda: monitor.step)
        except WorkerGroupError as error:
            if (mistake := user_error_of(error)) is not None:
                raise mistake from None
            raise
    value: dict[str, Any] = result.return_value
    return value


def _trainer(
    job: TrainJob, cluster: Cluster, request: Request, board: Any, callbacks: Sequence[UserCallback]
) -> TorchTrainer:
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job, "board": board},
        torch_config=LocalTorchConfig(
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
    keep_signal_handlers(trainer)
    if lacks_dashboard():
        drop_placement_group_cleaner(trainer)
    return trainer


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
        ClusterError: the process that directs the workers was lost, and with it the workers.
    """
    failures, reached = 0, step()
    while True:
        try:
            return trainer().fit()
        except RayActorError as error:
            raise ClusterError(
                f"the process of Ray Train's controller was lost ({str(error).splitlines()[0]}): give the command again, and it"
                " continues from the last checkpoint"
            ) from None
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


def user_error_of(error: BaseException) -> UserError | OSError | None:
    """User error or fault of a disk behind a failed training, if a worker met one."""
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    for failure in failures:
        inner = getattr(failure, "cause", failure)  # Ray wraps the exception of its task
        if isinstance(inner, UserError) or (isinstance(inner, OSError) and inner.errno in DISK_FAULTS):
            return inner
    return None

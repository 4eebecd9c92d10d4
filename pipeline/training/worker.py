"""The entry of a Ray Train worker: build its context, and train."""

import os
from dataclasses import replace
from typing import Any

import ray.train
import ray.train.torch
from ray.train.collective import broadcast_from_rank_zero
from ray.util import get_node_ip_address

from pipeline.ray_internals import silence_train_loggers
from pipeline.training.context import TrainJob, WorkerContext
from pipeline.training.worker_console import (
    WorkerConsole,
    final_errors,
    last_heartbeat_before_restart,
    watch_stop_request,
)


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Train on this worker, and return the result of the run.

    Args:
        config: {"job": TrainJob, "board": actor handle of the driver's `ProgressBoard`}.
    """
    # Imported here: Ray Train's controller imports this module too, and needs neither.
    from pipeline.training.evaluation_task import on_ray
    from pipeline.training.loop import train
    from pipeline.training.stop_request import StopRequest

    silence_train_loggers()
    job: TrainJob = config["job"]
    ray_context = ray.train.get_context()
    rank = ray_context.get_world_rank()
    if rank == 0 and (stopped_at := last_heartbeat_before_restart(config["board"])) is not None:
        job = replace(job, launched_at=stopped_at, restarted=True)
    place = f"process {os.getpid()} on {get_node_ip_address()}"  # type: ignore[no-untyped-call]
    console = WorkerConsole(config["board"], rank, place)
    asynchronous = job.experiment.evaluation.asynchronous and rank == 0
    context = WorkerContext(
        rank=rank,
        world_size=ray_context.get_world_size(),
        device=ray.train.torch.get_device(),
        broadcast=console.waiting(broadcast_from_rank_zero),
        console=console,
        report=console.waiting(ray.train.report),
        submit_evaluation=on_ray(job.evaluation_resources) if asynchronous else None,
        stop=watch_stop_request(config["board"]) if rank == 0 else StopRequest(),
    )
    with final_errors(config["board"]):
        return train(job, context)
